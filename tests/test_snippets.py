"""What stands in README and in the documentation can be pasted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from snippets import paste


@pytest.mark.parametrize("page", ["docs/bands.md", "docs/beyond.md"])
def test_code_for_numpy(page: str) -> None:
    assert paste(page, "numpy")["dquery"].ndim == 2


def test_code_for_causal_calls() -> None:
    names = paste("docs/causal.md", "numpy")
    assert names["out"].shape == names["near"].shape == (1000, 4)


def test_code_for_packed_documents() -> None:
    # What it shows is in the code.
    paste("docs/packed.md", "numpy")


def test_code_that_checks_a_library() -> None:
    # The check is in the code.
    paste("docs/api/backends.md", "numpy")


@pytest.mark.libraries("torch")
@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/index.md", "docs/quickstart.md", "docs/coming_from.md", "docs/examples/drop_in.md"],
)
def test_code_for_torch(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = paste(page, "torch")
    if "layer" in names:
        # What the comment beside it says.
        assert float(capsys.readouterr().out) == pytest.approx(0.034, abs=5e-4)


@pytest.mark.libraries("jax")
@pytest.mark.parametrize(("page", "shape"), [("docs/quickstart.md", (1000, 8)), ("docs/layers.md", (2, 1000, 64))])
def test_code_for_jax(page: str, shape: tuple[int, ...], float32_by_default: None) -> None:
    assert paste(page, "jax")["out"].shape == shape


@pytest.fixture
def float32_by_default() -> Iterator[None]:
    """JAX as it is for a reader, whatever other tests have set."""
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)
