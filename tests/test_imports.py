"""Which module may import which, as CONTRIBUTING.md lists them."""

from __future__ import annotations

import re

import pytest
from house import ROOT, SOURCE, layers, modules, rooms, upward

FOUND = upward(modules())


def test_every_module_has_its_line():
    assert sorted(name for line in layers() for name in line) == rooms()


@pytest.mark.parametrize("room", rooms())
def test_imports_point_downwards(room):
    assert not [text for text in FOUND if re.match(rf"{room}\b", text)]


def test_no_modules_import_each_other_in_a_circle():
    assert not [text for text in FOUND if text.startswith("a circle")]


def test_the_package_knows_nothing_of_what_stays_in_the_checkout():
    outside = {package.parent.name for package in ROOT.glob("*/__init__.py")}
    assert outside >= {"benchmarks", "evidence", "examples"}
    statement = re.compile(rf"^\s*(from|import) ({'|'.join(outside)})\b", re.MULTILINE)
    for file in SOURCE.rglob("*.py"):
        assert not statement.search(file.read_text(encoding="utf-8")), file.name
