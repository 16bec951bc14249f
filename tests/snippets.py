"""The code in README and in the documentation, as a reader pastes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LIBRARIES = ("torch", "jax", "dask")


def snippets(page: str, library: str) -> list[str]:
    """The blocks of a page that import the library, and those behind one that import nothing; doctests run elsewhere."""
    found, last = [], "numpy"
    for code in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        if "import " in code:
            last = next((name for name in LIBRARIES if re.search(rf"^import {name}\b", code, re.MULTILINE)), "numpy")
        if last == library and not code.startswith(">>>"):
            found.append(code)
    return found


def paste(page: str, library: str) -> dict[str, Any]:
    """Run the blocks one after the other; the names that they leave."""
    names: dict[str, Any] = {}
    codes = snippets(page, library)
    assert codes, f"{page} has no code for {library}"
    for code in codes:
        exec(compile(code, page, "exec"), names)
    return names
