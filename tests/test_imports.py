"""Which module may import which, as CONTRIBUTING.md lists them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "tattn"
# What users import, and the command line, stand above all.
ABOVE = ("__init__", "__main__")


def layers() -> list[list[str]]:
    """The lines of the list, the lowest last."""
    found = re.search(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert found
    return [re.findall(r"\w+", line) for line in found[1].strip().splitlines()]


def imported(file: Path) -> set[str]:
    """Modules and packages of `tattn` that a file imports from, anywhere in it."""
    depth = len(file.relative_to(SOURCE).parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.split(".")[1] for name in (a.name for a in node.names) if name.startswith("tattn.")}
        if isinstance(node, ast.ImportFrom):
            # As many dots as folders lead to `tattn` itself; an absolute name does as well.
            inside = node.level == depth or (node.level == 0 and (node.module or "").split(".")[0] == "tattn")
            names = (node.module or "").split(".")[node.level == 0 :]
            if inside:
                found |= {names[0]} if names and names[0] else {alias.name for alias in node.names}
    return found


def modules() -> list[str]:
    """All modules and packages of `tattn`."""
    return sorted({f.relative_to(SOURCE).parts[0].removesuffix(".py") for f in SOURCE.rglob("*.py")} - {*ABOVE})


def test_every_module_has_its_line():
    assert sorted(name for line in layers() for name in line) == modules()


@pytest.mark.parametrize("module", modules())
def test_imports_point_downwards(module):
    lines = layers()
    line = next(i for i, names in enumerate(lines) if module in names)
    below = {name for names in lines[line + 1 :] for name in names}
    alone = SOURCE / f"{module}.py"
    for file in [alone] if alone.exists() else sorted((SOURCE / module).rglob("*.py")):
        # A package may import from itself, and anything knows the version.
        assert imported(file) - {module, "__version__"} <= below, file.name


def test_the_package_knows_nothing_of_what_stays_in_the_checkout():
    outside = {package.parent.name for package in ROOT.glob("*/__init__.py")}
    assert outside >= {"benchmarks", "evidence", "examples"}
    statement = re.compile(rf"^\s*(from|import) ({'|'.join(outside)})\b", re.MULTILINE)
    for file in SOURCE.rglob("*.py"):
        assert not statement.search(file.read_text(encoding="utf-8")), file.name
