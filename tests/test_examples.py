"""The pages of the examples are those that their committed tables make."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from evidence.tables import load

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "examples"


@pytest.mark.parametrize("name", ["triple_detection", "three_modalities", "drop_in"])
@pytest.mark.libraries("torch")
def test_the_page_is_made_from_the_tables(name: str) -> None:
    pytest.importorskip("torch")
    example, shared = (importlib.import_module(f"examples.{module}") for module in (name, "shared"))
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    tables = {part: load(PAGES / f"{name}-{part}.csv") for part in example.PARTS}
    assert shared.written(name, tables, example.page) == text
    assert (PAGES / f"{name}.png").exists()
