"""Blocks of rows shared among threads: the same numbers, within their bounds, and the caller's settings as they were."""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

import tattn
from tattn.backends.base import Backend
from tattn.backends.tables import memoized
from tattn.backends.threads import libraries
from tattn.engines.features import joined

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
    found: Backend = library.backend
    if type(found).in_threads is Backend.in_threads or library.name not in ("numpy", "torch"):
        pytest.skip("operations of this library are not shared among threads")
    return found


@pytest.fixture
def shared(library: Any, backend: Backend) -> Iterator[list[int]]:
    """Three threads for calls of some hundred rows; the list tells how many tasks there were, scan by scan."""
    before = real_threads(backend)
    set_threads(library, 2)
    ran: list[int] = []
    in_threads = backend.in_threads

    def counted(tasks: Any, stop: Any) -> list[Any]:
        ran.append(len(tasks))

        def alone(task: Any) -> Any:
            assert real_threads(backend) == 1 or threading.current_thread() is threading.main_thread()
            return task()

        return in_threads([partial(alone, task) for task in tasks], stop)

    def three() -> int:
        return 3 if type(backend).threads(backend) > 1 else 1

    # A block may take four workspaces.
    with backend.using(threads=three, in_threads=counted, workspace=1 << 10, cache=1 << 14, shared_scores=1):
        yield ran
    set_threads(library, before)


def real_threads(backend: Backend) -> int:
    """Threads that the library uses for an operation just now, or would if it were not watched."""
    if backend.name == "NumPy":
        return min(blas.num_threads for blas in libraries("blas").lib_controllers)
    return type(backend).threads(backend)


def set_threads(library: Any, count: int) -> None:
    if library.name == "torch":
        import torch

        torch.set_num_threads(count)
    else:
        for blas in libraries("blas").lib_controllers:
            blas.set_num_threads(count)


CALLS = pytest.mark.parametrize(
    ("value_dim", "options", "scans"),
    # Two summaries and a read-out, and the adjoints of the query and of two views; the queries of the exact method, twice.
    [(3, {"plan": polynomial(3)}, 6), (20, {"plan": polynomial(20)}, 6), (3, {"method": "exact"}, 2)],
    ids=["lean", "in place", "exact"],
)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@CALLS
@pytest.mark.libraries("numpy", "torch")
@pytest.mark.grid("torch")
def test_the_numbers_are_those_of_one_thread(
    library: Any,
    backend: Backend,
    shared: list[int],
    value_dim: int,
    options: dict[str, Any],
    scans: int,
    masked: bool,
) -> None:
    given = draw(value_dim, masked=masked)
    found, again = run(library, given, **options), run(library, given, **options)
    assert shared == [3] * (2 * scans)
    shared.clear()
    with backend.using(threads=lambda: 1):
        expected = run(library, given, **options)
    assert shared == []
    for name, a, b, e in zip(("out", "lse", "dquery", "da", "db", "du", "dv"), found, again, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12 * np.max(np.abs(e)), err_msg=name)


@pytest.mark.parametrize(
    ("views", "leading", "size", "options"),
    [
        (1, ((), ()), 1.0, {"degree": 4}),
        (3, ((), ()), 1.0, {"degree": 3}),
        (2, ((2, 1), (3,)), 1.0, {"degree": 3}),
        (2, ((2, 1), (3,)), 1.0, {"method": "exact"}),
        (1, ((), ()), 9.0, {"method": "exact"}),
        (2, ((), (2,)), 9.0, {"method": "exact", "causal": True}),
        (2, ((), ()), 1.0, {"method": "exact", "window": (50, 20)}),
        (2, ((), ()), 1.0, {"degree": 3, "causal": True}),
    ],
    ids=str,
)
@pytest.mark.libraries("numpy", "torch")
@pytest.mark.grid("torch")
def test_any_call(
    library: Any,
    backend: Backend,
    shared: list[int],
    views: int,
    leading: tuple[tuple[int, ...], tuple[int, ...]],
    size: float,
    options: dict[str, Any],
) -> None:
    """Views, shared keys, large scores, order: as in one thread, one view with a row that sees nothing."""
    rng = np.random.default_rng(views)
    n = 240 if views < 3 else 200
    query = rng.uniform(-size, size, (*leading[0], n, 3))
    keys = [
        rng.uniform(-1, 1, (*leading[1], 11 if i and options.keys().isdisjoint({"causal", "window"}) else n, 3))
        for i in range(views)
    ]
    values = [rng.normal(size=(*k.shape[:-1], 2)) for k in keys]
    masks = [rng.random(k.shape[:-1]) < 0.8 for k in keys]
    for mask in masks:
        mask[..., :1] = False
    grad = rng.normal(size=(*np.broadcast_shapes(*leading), n, 2))
    if "degree" in options:
        causal = options.get("causal", False)
        lengths = [n, *(k.shape[-2] for k in keys)]
        plan = tattn.plan_for(
            n=lengths, dim=3, order=views + 1, value_dim=2, bound=1.0, degree=options["degree"], dtype="float64",
            causal=causal,
        )  # fmt: skip
        options = {"plan": plan, "causal": causal}
    given = query, keys, values, masks, grad
    found = run(library, given, **options)
    assert set(shared) <= {3}
    with backend.using(threads=lambda: 1):
        expected = run(library, given, **options)
    for a, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-11, atol=1e-11 * max(1.0, np.nanmax(np.abs(e[np.isfinite(e)]))))


@pytest.mark.libraries("numpy", "torch")
def test_sums_of_a_stream(library: Any, backend: Backend, shared: list[int]) -> None:
    query, keys, values, _, _ = draw(3)
    moved = library.arrays(query, keys, values)

    def found() -> list[np.ndarray]:
        summary = tattn.summarize(*moved[1:], polynomial(3))
        return [library.numpy(x) for x in (*summary.sums, summary.attend(moved[0]))]

    several = found()
    assert shared
    with backend.using(threads=lambda: 1):
        alone = found()
    for a, b in zip(several, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.libraries("numpy", "torch")
def test_what_one_thread_raises_is_raised(backend: Backend, shared: list[int], library: Any) -> None:
    """And the next call is shared again."""
    rows = library.array(np.zeros((100, 2)))

    def body(carry: int, block: Any) -> Any:
        if threading.current_thread().name.endswith("-1"):
            raise ArithmeticError("in a thread")
        return carry + 1, (block,)

    for _ in range(2):
        with pytest.raises(ArithmeticError, match="in a thread"):
            backend.share_rows(body, 0, (rows,), 10, 10)
    assert shared == [3, 3]
    assert real_threads(backend) == 2


def in_a_new_thread(backend: Backend) -> int:
    """Threads that the library uses for an operation in a thread that is born now."""
    found: list[int] = []
    born = threading.Thread(target=lambda: found.append(real_threads(backend)))
    born.start()
    born.join()
    return found[0]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A program that a shell starts in the background ignores interrupts, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.libraries("numpy", "torch")
def test_an_interrupted_call_waits_for_its_threads(library: Any, backend: Backend, shared: list[int]) -> None:
    """Ctrl-C, several times: a call ends when its threads have, which is early, and limits are put back then."""
    rows, inside, blocks, over = library.array(np.zeros((300, 2))), [], [], threading.Event()

    def body(carry: int, block: Any) -> Any:
        name = threading.current_thread().name
        inside.append(name)
        blocks.append(real_threads(backend))
        if name.endswith("-0") and len(blocks) < 20:
            for _ in range(0 if over.is_set() else 5):
                time.sleep(0.02)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.1)
        inside.pop()
        return carry, (block,)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            backend.share_rows(body, 0, (rows,), 1, 10)
        running = list(inside)
        over.set()
        assert running == []
        assert real_threads(backend) == in_a_new_thread(backend) == 2
        assert set(blocks) == {1}
        assert len(blocks) < 20
        blocks.clear()
        over.clear()
    assert shared == [3, 3]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.libraries("numpy", "torch")
def test_an_interrupt_while_threads_are_started(
    library: Any, backend: Backend, shared: list[int], monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    """`start` may be interrupted before or after its thread begins: that one is waited for, or does nothing later."""
    late: list[Any] = []
    ran: list[str] = []

    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name.endswith("-0"):
            return start(thread)
        if begins:
            start(thread)
        else:
            late.append(partial(start, thread))
        raise KeyboardInterrupt

    def body(carry: int, block: Any) -> Any:
        time.sleep(0.05)
        ran.append(threading.current_thread().name)
        return carry, (block,)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(threading.Thread, "start", interrupted)
        backend.share_rows(body, 0, (library.array(np.zeros((300, 2))),), 1, 10)
    after = len(ran)
    assert real_threads(backend) == in_a_new_thread(backend) == 2
    for begin in late:
        begin()
    time.sleep(0.2)
    assert len(ran) == after


@pytest.mark.libraries("numpy", "torch")
def test_settings_are_those_of_the_caller(library: Any, backend: Backend, shared: list[int]) -> None:
    """Four callers at once: one has the threads, all the same numbers but for rounding, and nothing is left changed."""
    given = draw(3)
    expected = run(library, given, plan=polynomial(3))
    found: list[Any] = [None] * 4

    together = threading.Barrier(4)

    def call(i: int) -> None:
        # A thread of torch has a number of threads from when it first asks.
        assert real_threads(backend) == 2
        together.wait()
        found[i] = run(library, given, plan=polynomial(3))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    # BLAS has one thread in the whole process while a NumPy call is shared: those beside it may round otherwise.
    rounding = 1e-12 if library.name == "numpy" else 0.0
    for result in found:
        for a, e in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=rounding * np.abs(e).max())
    assert real_threads(backend) == 2


@pytest.mark.libraries("numpy", "torch")
def test_threads_end_early_where_one_failed(library: Any, backend: Backend, shared: list[int]) -> None:
    blocks: list[str] = []

    def body(carry: int, block: Any) -> Any:
        blocks.append(threading.current_thread().name)
        if blocks[-1].endswith("-0"):
            raise ArithmeticError
        time.sleep(0.05)
        return carry, (block,)

    with pytest.raises(ArithmeticError):
        backend.share_rows(body, 0, (library.array(np.zeros((300, 2))),), 1, 10)
    assert len(blocks) < 20


@pytest.mark.libraries("numpy", "torch")
def test_without_further_threads(library: Any, shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the interpreter, say: this thread does what no other can be started for."""
    given = draw(3)
    expected = run(library, given, plan=polynomial(3))
    started: list[int] = []

    start = threading.Thread.start

    def every_other(thread: threading.Thread) -> None:
        started.append(1)
        if len(started) % 2 == 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", every_other)
    for a, e in zip(run(library, given, plan=polynomial(3)), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12 * np.max(np.abs(e)))
    assert len(started) == 12


def test_sums_that_are_joined_keep_what_they_lost() -> None:
    """Sum less what was lost, in numbers that are exact: (1 − 1/4) + (2 + 1/2) + (4 − 1)."""
    total, lost = joined([(1.0, 0.25), (2.0, -0.5), (4.0, 1.0)])
    assert total - lost == 6.25


@pytest.mark.libraries("numpy", "torch")
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


@pytest.mark.libraries("torch")
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


@pytest.mark.libraries("torch")
def test_operations_that_are_counted_stay_in_their_thread(torch: Any, backend: Backend, shared: list[int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    assert real_threads(backend) == 2
    with FlopCounterMode(display=False):
        assert real_threads(backend) == 1
    with torch.device("cpu"):
        assert real_threads(backend) == 1


@pytest.mark.libraries("torch")
def test_what_is_recorded_stays_in_its_thread(library: Any, torch: Any, shared: list[int]) -> None:
    """A trace holds for other numbers, too."""
    query, keys, values, _, _ = library.arrays(*draw(3))

    def function(q: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
        return tattn.summarize([a, b], [u, v], polynomial(3)).attend(q)

    arrays = [query, *keys, *values]
    # Of numbers that a trace takes for constants: those of shapes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(function, arrays, check_trace=False)
    others = [x.flip(0) for x in arrays]
    np.testing.assert_allclose(traced(*others).numpy(), function(*others).numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.libraries("torch")
def test_threads_born_meanwhile_have_their_number(
    library: Any, torch: Any, backend: Backend, shared: list[int]
) -> None:
    seen: list[int] = []

    def body(carry: int, block: Any) -> Any:
        time.sleep(0.5)
        born = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        born.start()
        born.join()
        return carry, (block,)

    backend.share_rows(body, 0, (library.array(np.zeros((30, 2))),), 10, 10)
    assert seen == [2] * 3


@pytest.mark.libraries("torch")
def test_operations_between_shared_passes_take_no_threads(
    library: Any, torch: Any, backend: Backend, shared: list[int]
) -> None:
    """Those of OpenMP and MKL would wait actively beside ours. Other threads keep theirs, and a call leaves all as it was."""
    from tattn.backends.torch import _of_mkl

    seen: list[Any] = []
    # None of torch without MKL.
    before = _of_mkl()(2)

    def body(carry: int, block: Any) -> Any:
        return carry, (block,)

    def look(failing: bool, backend: Backend, arrays: Any) -> None:
        for _ in range(2):
            seen.append(
                (torch.get_num_threads(), type(backend).threads(backend), in_a_new_thread(backend), _of_mkl()(1))
            )
            backend.share_rows(body, 0, arrays, 10, 10)
        if failing:
            raise ArithmeticError

    rows = (library.array(np.zeros((30, 2))),)
    backend.run(look, False, rows)
    with pytest.raises(ArithmeticError):
        backend.run(look, True, rows)
    assert seen == [(1, 2, 2, min(before, 1))] * 4
    assert (torch.get_num_threads(), _of_mkl()(2)) == (2, before)


@pytest.mark.libraries("torch")
def test_other_libraries_of_openmp_keep_their_number_of_threads(
    torch: Any, backend: Backend, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        num_threads = 7

        def set_num_threads(self, count: int) -> None:
            self.num_threads = count

    other = Other()
    openmp = libraries("openmp")
    monkeypatch.setattr(openmp, "lib_controllers", [*openmp.lib_controllers, other])
    assert backend.run(lambda *given: other.num_threads, None, (torch.zeros(1),)) == 1
    assert (other.num_threads, torch.get_num_threads()) == (7, 2)


def test_what_is_computed_once_may_be_asked_for_by_several_threads() -> None:
    """Results that are dropped meanwhile, too."""
    square = memoized(lambda i: i * i, most=2)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda seed: [square((seed + i) % 5) for i in range(5000)], range(8)))
    finally:
        sys.setswitchinterval(before)
    assert found == [[((seed + i) % 5) ** 2 for i in range(5000)] for seed in range(8)]
