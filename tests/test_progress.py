"""How far a long call has come is told to who asked, pass by pass over the rows, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Library

import tattn
from tattn.backends.progress import TOLD

N = 300


def arrays(library: Library) -> Any:
    query, a, b, u, v = np.random.default_rng(0).uniform(-1, 1, (5, N, 4))
    return library.arrays(query, [a, b], [u, v])


def passes(told: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """What was told, cut where a pass over the rows has come to its end."""
    found: list[list[tuple[int, int]]] = [[]]
    for done, total in told:
        found[-1].append((done, total))
        if done == total:
            found.append([])
    assert not found.pop()
    return found


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_every_pass_is_told_to_its_end(library: Library, method: str) -> None:
    given = arrays(library)
    told: list[tuple[int, int]] = []
    out, pullback = tattn.tensor_attention_vjp(*given, method=method, progress=lambda *said: told.append(said))
    forward = len(told)
    grads = pullback(out)
    plain, plain_pullback = tattn.tensor_attention_vjp(*given, method=method)
    for found, expected in ((out, plain), (grads[0], plain_pullback(plain)[0])):
        assert np.array_equal(library.numpy(found), library.numpy(expected))
    assert not TOLD
    if library.name == "jax":
        assert not told
        return
    assert forward or method == "polynomial"
    for one in (*passes(told[:forward]), *passes(told[forward:])):
        rows = [done for done, _ in one]
        assert rows == sorted(set(rows))
        assert {total for _, total in one} == {N}


def test_what_a_listener_raises_ends_the_call(library: Library) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    if library.name == "jax":
        # A compiled program tells nothing.
        tattn.tensor_attention(*arrays(library), method="exact", progress=stop)
        return
    with pytest.raises(KeyboardInterrupt):
        tattn.tensor_attention(*arrays(library), method="exact", progress=stop)
    assert not TOLD


@pytest.mark.parametrize("function", [tattn.tensor_attention, tattn.tensor_attention_vjp])
def test_what_cannot_be_told_is_refused(function: Callable[..., Any]) -> None:
    query, *views = np.ones((5, 4, 2))
    with pytest.raises(TypeError, match=r"^progress should be True or callable, got str"):
        function(query, views[:2], views[2:], progress="bar")


def test_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    query, *views = np.random.default_rng(0).normal(size=(5, N, 4))
    tattn.tensor_attention(query, views[:2], views[2:], method="exact", progress=True)
    said = capsys.readouterr().err
    assert "100%" in said
    # The line is ended: what the caller prints next does not stand behind the bar.
    assert said.endswith("\n")


def test_a_bar_for_every_part_of_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    query, *views = np.random.default_rng(0).normal(size=(5, N, 4))
    out, pullback = tattn.tensor_attention_vjp(query, views[:2], views[2:], method="exact", progress=True)
    for said in (capsys.readouterr().err, str(pullback(out) and capsys.readouterr().err)):
        assert "100%" in said
        assert said.endswith("\n")
