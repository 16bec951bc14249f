"""What stands in README and in the documentation can be pasted."""

from __future__ import annotations

import pytest
from snippets import paste


@pytest.mark.parametrize("page", ["docs/bands.md", "docs/beyond.md"])
def test_code_for_numpy(page: str) -> None:
    assert paste(page, "numpy")["dquery"].ndim == 2


@pytest.mark.libraries("torch")
@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/quickstart.md", "docs/coming_from.md"])
def test_code_for_torch(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = paste(page, "torch")
    if "layer" in names:
        # What the comment beside it says.
        assert float(capsys.readouterr().out) == pytest.approx(0.0012, abs=5e-5)


@pytest.mark.libraries("jax")
@pytest.mark.parametrize("page", ["docs/quickstart.md"])
def test_code_for_jax(page: str) -> None:
    assert paste(page, "jax")["out"].shape == (1000, 8)
