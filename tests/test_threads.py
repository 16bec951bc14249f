"""Blocks of rows shared among threads: the same numbers, within their bounds, and the caller's settings as they were."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

import tattn
from tattn.backends import backend_of
from tattn.backends.base import Backend, memoized
from tattn.backends.numpy import _blas

N, KEYS = 300, (290, 200)


def draw(value_dim: int, *, masked: bool = False) -> tuple[Any, ...]:
    rng = np.random.default_rng(value_dim)
    query, *keys = (rng.uniform(-1, 1, (n, 4)) for n in (N, *KEYS))
    values = [rng.normal(size=(n, value_dim)) for n in KEYS]
    masks = [rng.random(n) < 0.7 for n in KEYS] if masked else None
    return query, keys, values, masks, rng.normal(size=(N, value_dim))


def polynomial(value_dim: int, dtype: str = "float64") -> tattn.Plan:
    return tattn.plan_for(n=300, dim=4, value_dim=value_dim, bound=1.0, degree=4, dtype=dtype, method="polynomial")


def run(library: Any, given: tuple[Any, ...], **options: Any) -> list[np.ndarray]:
    """Output, lse and gradients."""
    query, keys, values, masks, grad = library.arrays(*given)
    (out, lse), pullback = tattn.tensor_attention_vjp(query, keys, values, key_masks=masks, return_lse=True, **options)
    d_query, d_keys, d_values = pullback(grad)
    return [library.numpy(x) for x in (out, lse, d_query, *d_keys, *d_values)]


@pytest.fixture
def backend(library: Any) -> Backend:
    """What computes in threads; skips where the library does not."""
    array = library.array(np.zeros(1))
    found: Any = backend_of(array)
    found = found.for_arrays([array])
    if type(found).in_threads is Backend.in_threads or library.name not in ("numpy", "torch"):
        pytest.skip("operations of this library are not shared among threads")
    return found


@pytest.fixture
def shared(library: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Three threads for calls of some hundred rows; the list tells how many tasks there were, scan by scan."""
    monkeypatch.setattr(backend, "threads", lambda: 3)
    monkeypatch.setattr(backend, "workspace", 1 << 12)
    monkeypatch.setattr(backend, "cache", 1 << 14)
    monkeypatch.setattr("tattn.lowrank._FEW_ROWS", 1)
    monkeypatch.setattr("tattn.exact._SHARED", 1)
    ran: list[int] = []
    in_threads = backend.in_threads

    def counted(tasks: Any) -> list[Any]:
        ran.append(len(tasks))

        def alone(task: Any) -> Any:
            assert real_threads(backend) == 1
            return task()

        return in_threads([partial(alone, task) for task in tasks])

    monkeypatch.setattr(backend, "in_threads", counted)
    before = real_threads(backend)
    set_threads(library, 2)
    yield ran
    set_threads(library, before)


def real_threads(backend: Backend) -> int:
    """Threads that the library uses for an operation."""
    return type(backend).threads(backend)


def set_threads(library: Any, count: int) -> None:
    if library.name == "torch":
        import torch

        torch.set_num_threads(count)
    else:
        for blas in _blas().lib_controllers:
            blas.set_num_threads(count)


CALLS = pytest.mark.parametrize(
    ("value_dim", "options", "scans"),
    # Two summaries and a read-out, and the adjoints of the query and of two views; the queries of the exact method, twice.
    [(3, {"plan": polynomial(3)}, 6), (20, {"plan": polynomial(20)}, 6), (3, {"method": "exact"}, 2)],
    ids=["lean", "in place", "exact"],
)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@CALLS
def test_the_numbers_are_those_of_one_thread(
    library: Any,
    backend: Backend,
    shared: list[int],
    monkeypatch: pytest.MonkeyPatch,
    value_dim: int,
    options: dict[str, Any],
    scans: int,
    masked: bool,
) -> None:
    given = draw(value_dim, masked=masked)
    found, again = run(library, given, **options), run(library, given, **options)
    assert shared == [3] * (2 * scans)
    shared.clear()
    monkeypatch.setattr(backend, "threads", lambda: 1)
    expected = run(library, given, **options)
    assert shared == []
    for name, a, b, e in zip(("out", "lse", "dquery", "da", "db", "du", "dv"), found, again, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12 * np.max(np.abs(e)), err_msg=name)


def test_sums_of_a_stream(library: Any, backend: Backend, shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values, _, _ = draw(3)
    moved = library.arrays(query, keys, values)

    def found() -> list[np.ndarray]:
        summary = tattn.summarize(*moved[1:], polynomial(3))
        return [library.numpy(x) for x in (*summary.sums, summary.attend(moved[0]))]

    several = found()
    assert shared
    monkeypatch.setattr(backend, "threads", lambda: 1)
    for a, b in zip(several, found(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_what_one_thread_raises_is_raised(backend: Backend, shared: list[int], library: Any) -> None:
    """And the next call is shared again."""
    rows = library.array(np.zeros((100, 2)))

    def make_body() -> Any:
        def body(carry: int, block: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise ArithmeticError("in a thread")
            return carry + 1, (block,)

        return body

    for _ in range(2):
        with pytest.raises(ArithmeticError, match="in a thread"):
            backend.share_rows(make_body, 0, (rows,), 10, 10)
    assert shared == [3, 3]
    assert real_threads(backend) == 2


def test_settings_are_those_of_the_caller(library: Any, backend: Backend, shared: list[int]) -> None:
    """Two callers at once: one has the threads, both the right numbers, and nothing is left changed."""
    given = draw(3)
    expected = run(library, given, plan=polynomial(3))
    found: list[Any] = [None] * 4

    def call(i: int) -> None:
        found[i] = run(library, given, plan=polynomial(3))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in found:
        for a, e in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12 * np.max(np.abs(e)))
    assert real_threads(backend) == 2


def test_overflow_in_a_thread_is_as_quiet(library: Any, shared: list[int]) -> None:
    """Values near the largest float32: sums overflow, in NumPy without a warning, and the answer is not finite."""
    query, keys, values, _, _ = draw(3)
    moved = library.arrays(*([np.asarray(x, "float32") for x in rows] for rows in ([query], keys)))
    large = library.arrays([np.full_like(np.asarray(v, "float32"), 3e38) for v in values])
    out = library.numpy(tattn.tensor_attention(moved[0][0], moved[1], large, plan=polynomial(3, "float32")))
    assert shared
    assert not np.isfinite(out).any()


@pytest.fixture
def torch(library: Any) -> Any:
    if library.name != "torch":
        pytest.skip("of torch")
    return pytest.importorskip("torch")


def test_inference_mode_and_autograd_reach_the_threads(library: Any, torch: Any, shared: list[int]) -> None:
    given = draw(3)
    query, keys, values, _, grad = library.arrays(*given)
    expected = run(library, given, plan=polynomial(3))
    with torch.inference_mode():
        inside = [x + 0.0 for x in (query, *keys, *values)]
        out = tattn.tensor_attention(inside[0], inside[1:3], inside[3:], plan=polynomial(3))
    np.testing.assert_array_equal(out.numpy(), expected[0])
    leaves = [x.clone().requires_grad_() for x in (query, *keys, *values)]
    shared.clear()
    out = tattn.tensor_attention(leaves[0], leaves[1:3], leaves[3:], plan=polynomial(3))
    assert shared == [3] * 3
    out.backward(grad)
    assert shared == [3] * 6
    for a, e in zip((out, *(x.grad for x in leaves)), [expected[0], *expected[2:]], strict=True):
        np.testing.assert_allclose(a.detach().numpy(), e, rtol=1e-12, atol=1e-12)


def test_operations_that_are_counted_stay_in_their_thread(torch: Any, backend: Backend, shared: list[int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    assert real_threads(backend) == 2
    with FlopCounterMode(display=False):
        assert real_threads(backend) == 1
    with torch.device("cpu"):
        assert real_threads(backend) == 1


def test_what_is_computed_once_may_be_asked_for_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are dropped meanwhile, too."""
    monkeypatch.setattr("tattn.backends.base.REMEMBERED", 2)
    square = memoized(lambda i: i * i)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda seed: [square((seed + i) % 5) for i in range(5000)], range(8)))
    finally:
        sys.setswitchinterval(before)
    assert found == [[((seed + i) % 5) ** 2 for i in range(5000)] for seed in range(8)]
