"""The pages of the examples are those that their committed tables make; what they compute is what they say."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from evidence.tables import load

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "examples"


def the_page_is_made_from_the_tables(name: str) -> None:
    example, shared = (importlib.import_module(f"examples.{module}") for module in (name, "shared"))
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    tables = {part: load(PAGES / f"{name}-{part}.csv") for part in example.PARTS}
    assert shared.written(name, tables, example.page) == text
    assert (PAGES / f"{name}.png").exists()


@pytest.mark.parametrize("name", ["triple_detection", "three_modalities", "drop_in"])
@pytest.mark.libraries("torch")
def test_the_page_of_layers_is_made_from_the_tables(name: str) -> None:
    pytest.importorskip("torch")
    the_page_is_made_from_the_tables(name)


def test_the_page_of_sums_is_made_from_the_tables() -> None:
    the_page_is_made_from_the_tables("sphere_triplets")


def test_sums_over_triangles_keep_the_stated_error() -> None:
    from examples import sphere_triplets as example

    x, weights = example.points(300, np.random.default_rng(3))
    triangles = example.directly(x, weights)
    np.testing.assert_allclose(example.by_harmonics(x, weights), triangles, rtol=1e-12)
    normaliser = example.directly(x, np.ones(300))
    for tol in example.TOLERANCES[:2]:
        found = example.by_tensor_attention(x, weights, tol)
        error = np.abs(found.mean - triangles / normaliser).max() / weights.max() ** 2
        assert error <= found.error <= tol
        np.testing.assert_allclose(found.lse, np.log(normaliser), atol=-np.log1p(-found.error))
