"""Where arrays are far away: a planned call reads nothing, copies nothing there twice, and stays on the device of its arrays.

By a stand-in that is plugged in as a library from outside would be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import array_api_compat.numpy as xp
import guarded
import numpy as np
import pytest
from reference import score_by_score

import tattn
from tattn.backends import Backend, backend_of
from tattn.backends.tables import Tables
from tattn.conformance import check
from tattn.methods import Call, Polynomial, backward, forward

ROWS, DIM = 40, 3


@pytest.fixture(scope="module", autouse=True)
def plugged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`guarded` with its plug, as if a package that offers it were installed."""
    site = tmp_path_factory.mktemp("site")
    info = site / "guarded-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guarded\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tattn.backends]\nguarded = guarded_plug:BACKEND\n")
    sys.path.insert(0, str(site))
    yield
    sys.path.remove(str(site))


def there(array: np.ndarray) -> Any:
    """The array on another device than the current one."""
    return guarded.ndarray(array, 1)


PLANS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact", "bound": 1.0},
    "polynomial": {"method": "polynomial", "bound": 1.0},
    "three views": {"method": "polynomial", "bound": 1.0, "order": 4},
    "norm bands": {"series": "banded"},
    "causal exact": {"method": "exact", "bound": 1.0, "causal": True},
    "causal polynomial": {"method": "polynomial", "bound": 1.0, "causal": True},
    "window": {"bound": 1.0, "window": (4, 6)},
}


def plan_of(name: str) -> tattn.Plan:
    return tattn.plan_for(n=ROWS, dim=DIM, tol=1e-2, dtype="float64", **PLANS[name])


def attend(told: dict[str, Any], q: Any, a: Any, u: Any, mask: Any, **options: Any) -> Any:
    return tattn.tensor_attention(q, a, u, key_masks=mask, **options, **told)


def pull_back(told: dict[str, Any], q: Any, a: Any, u: Any, mask: Any, **options: Any) -> Any:
    out, pullback = tattn.tensor_attention_vjp(q, a, u, key_masks=mask, **options)
    return out, pullback(u[0][..., : q.shape[-2], :], **told)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "forward": (attend, {"return_lse": True}),
    "bound": (attend, {"return_error": True}),
    "gradient": (pull_back, {}),
    "bounds of gradients": (pull_back, {"return_error": True}),
}


def flat(found: Any) -> list[Any]:
    """The arrays in nested tuples."""
    return [array for part in found for array in flat(part)] if isinstance(found, (tuple, list)) else [found]


def far_and_near(of: Callable[[Callable[[np.ndarray], Any]], Any]) -> None:
    """A call is repeated without a read or a copy, on the device of its arrays, and gives what NumPy does."""
    of(there)
    guarded.reads = guarded.uploads = 0
    found = flat(of(there))
    assert (guarded.reads, guarded.uploads) == (0, 0)
    for array, expected in zip(found, flat(of(np.asarray)), strict=True):
        assert array.device == guarded.Device(1)
        np.testing.assert_allclose(array.get(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_planned_call_reads_nothing(plan: str, call: str, masked: bool, leading: tuple[int, ...]) -> None:
    planned = plan_of(plan)
    views = planned.order - 1
    rng = np.random.default_rng(0)
    drawn = rng.uniform(-1, 1, (1 + 2 * views, *leading, ROWS, DIM))
    mask = rng.uniform(size=ROWS) < 0.8
    function, told = CALLS[call]

    def of(move: Callable[[np.ndarray], Any]) -> Any:
        q, *rest = map(move, drawn)
        masks = [move(mask), *[None] * (views - 1)] if masked else None
        options = {"plan": planned, "causal": planned.causal, "window": planned.window}
        return function(told, q, rest[:views], rest[views:], masks, **options)

    far_and_near(of)


def test_scores_in_place_of_features_are_not_read() -> None:
    plan = score_by_score(plan_of("polynomial"))
    q, a, b, u, v = np.random.default_rng(0).uniform(-1, 1, (5, ROWS, DIM))
    far_and_near(lambda move: pull_back({}, move(q), [move(a), move(b)], [move(u), move(v)], None, plan=plan))


@pytest.mark.parametrize("grading", [(), (1, 1, 2), (1, 2, 9)])
def test_pruned_bases_are_not_read(grading: tuple[int, ...]) -> None:
    drawn = np.random.default_rng(0).uniform(-1, 1, (5, ROWS, DIM))
    call = Call(Polynomial("taylor", (1.0, 1.0, 0.5, 1 / 6, 1 / 24), 1.0, grading=grading), 2, 1.0)

    def of(move: Callable[[np.ndarray], Any]) -> Any:
        arrays = *map(move, drawn), None, None
        backend: Any = backend_of(arrays[0])
        out, lse, *kept = backend.run(forward, call, arrays)
        columns = out, *kept, arrays[1], lse
        return out, lse, backend.run(backward, call, (*arrays, *columns))

    far_and_near(of)


STREAMED: dict[str, Callable[..., Any]] = {
    "summarize": lambda s, plan, q, a, u: (s.sums, s.rests),
    "update": lambda s, plan, q, a, u: s.update(a, u).sums,
    "update one view": lambda s, plan, q, a, u: s.update([a[0], None], [u[0], None]).sums,
    "add up": lambda s, plan, q, a, u: (s + s).sums,
    "attend": lambda s, plan, q, a, u: s.attend(q, return_lse=True),
    "pull back": lambda s, plan, q, a, u: s.attend_vjp(q)[1](q),
    "pull back sums": lambda s, plan, q, a, u: tattn.summarize_vjp(a, u, plan)[1](s.sums),
    "decode": lambda s, plan, q, a, u: tattn.DecodingState(plan, s)
    .step(q[:1], [x[:1] for x in a], [x[:1] for x in u])[0],
}  # fmt: skip


@pytest.mark.parametrize("call", STREAMED)
def test_summaries_are_not_read(call: str) -> None:
    plan = plan_of("polynomial")
    q, a, b, u, v = np.random.default_rng(0).uniform(-1, 1, (5, ROWS, DIM))

    def of(move: Callable[[np.ndarray], Any]) -> Any:
        keys, values = [move(a), move(b)], [move(u), move(v)]
        return STREAMED[call](tattn.summarize(keys, values, plan), plan, move(q), keys, values)

    far_and_near(of)


def test_a_look_at_the_data_is_one_read() -> None:
    q, a, b, u, v = map(there, np.random.default_rng(0).uniform(-1, 1, (5, ROWS, DIM)))
    guarded.reads = 0
    tattn.plan(q, [a, b])
    assert guarded.reads == 1
    out = tattn.tensor_attention(q, [a, b], [u, v])
    guarded.reads = 0
    tattn.measure_error(q, [a, b], [u, v], out)
    assert guarded.reads == 1


def test_samples_come_from_their_device() -> None:
    q, a, b = np.random.default_rng(0).uniform(-1, 1, (3, ROWS, DIM))
    plan = tattn.plan(there(q), [there(a), there(b)], bound="estimated")
    assert plan == tattn.plan(q, [a, b], bound="estimated")


def test_the_training_problem_stays_on_its_device() -> None:
    from tattn import paper as training

    rng = np.random.default_rng(0)
    drawn = [*rng.uniform(-1, 1, (5, 12, DIM)), rng.uniform(-1, 1, (12, DIM)), *rng.uniform(-0.5, 0.5, (5, DIM, DIM))]
    for function in (training.loss, training.exact_gradient, training.weight_gradients):
        found, expected = (function(training.TrainingProblem(*map(move, drawn))) for move in (there, np.asarray))
        pairs = [(found, expected)] if not isinstance(expected, tuple) else zip(found, expected, strict=True)
        for array, by_numpy in pairs:
            assert array.device == guarded.Device(1)
            np.testing.assert_allclose(array.get(), by_numpy, rtol=1e-9, atol=1e-9)


def test_the_stand_in_refuses_to_be_read() -> None:
    """What this file rests on."""
    x = there(np.ones(3))
    for read in (bool, float, int, np.asarray, list, lambda x: np.ones(3) + x, lambda x: x + np.ones(3)):
        with pytest.raises((TypeError, ValueError)):
            read(x)
    with pytest.raises(ValueError, match="current"):
        x + 1
    with guarded.Device(1):
        guarded.reads = 0
        x[x > 0]
        assert guarded.reads == 1


def test_the_check_for_authors_of_a_plug(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(there) == []
    assert check(there, dtype="float64") == []
    backend: Any = backend_of(there(np.ones(2)))
    broken: dict[str, tuple[str, Any]] = {
        "to_numpy and read": ("to_numpy", lambda array: 2 * array.get()),
        "table": ("uploaded", lambda numbers, like, dtype: guarded.ndarray(numbers + 1.0, 1)),
        "dtype_name": ("dtype_name", lambda dtype: "float32"),
        "polynomial": ("multiply_into", lambda target, left, right: None),
        "power_of_two": ("power_of_two", lambda power: guarded.exp(power)),
    }
    for name, (method, wrong) in broken.items():
        with monkeypatch.context() as patch:
            patch.setattr(backend, "tables", Tables())
            patch.setattr(backend, method, wrong)
            found = check(there)
        assert any(line.startswith(f"{name}: ") for line in found), (name, found)
    with monkeypatch.context() as patch:
        patch.setattr(type(backend.xp), "concat", property(lambda _: getattr(guarded, "no such thing")))
        assert check(there) == ["the standard asks for concat"]
    with pytest.raises(ValueError, match="dtype should be"):
        check(np.asarray, dtype="float16")
    found = check(lambda _: object())
    assert len(found) == 1
    assert found[0].startswith("no backend: the array is none of the standard, and 'tattn.backends' has no entry point")


def test_functions_asked_of_a_namespace_are_those_used() -> None:
    """Outside of what is for certain libraries alone."""
    import re

    from tattn.backends.base import DTYPES, FUNCTIONS

    source = Path(tattn.__file__).parent
    apart = {"nn", "demo", "evidence"}
    used = set()
    for file in source.rglob("*.py"):
        if file.relative_to(source).parts[0] not in apart:
            used |= set(re.findall(r"\bxp\.([a-z]\w*)", file.read_text(encoding="utf-8")))
    assert used == {*FUNCTIONS, *DTYPES, "inf", "nan"}
    page = (Path(__file__).parents[2] / "docs" / "api" / "backends.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in (*FUNCTIONS, *DTYPES))


def test_tables_are_bounded() -> None:
    """By number and by size; the newest is held whatever its size, and those of a captured graph for good."""
    tables = Tables(3, 100)
    for i in range(3):
        assert tables.add(i, f"table {i}", 10) == []
    assert tables.add(3, "table 3", 10) == ["table 0"]
    assert [tables.find(i) for i in range(4)] == [None, "table 1", "table 2", "table 3"]
    assert tables.add(4, "large", 1000) == ["table 1", "table 2", "table 3"]
    assert tables.find(4) == "large"
    assert tables.add(5, "small", 10) == ["large"]
    assert tables.add(5, "again", 10) == ["small"]
    assert tables.add(6, "other", 80) == []


def test_threads_share_tables() -> None:
    """While tables are let go of all the time."""
    from concurrent.futures import ThreadPoolExecutor

    backend, like = Backend(xp), xp.ones(2)
    backend.tables = Tables(3)

    def right(seed: int) -> bool:
        sizes = np.random.default_rng(seed).integers(1, 9, 300).tolist()
        return all(backend.table(np.arange, n, like=like).shape == (n,) for n in sizes)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(8)))
    held = backend.tables._held
    assert len(held) <= 3
    assert backend.tables._bytes == sum(size for _, size in held.values())


class _Capturing(Backend):
    """Of a library that captures what it does."""

    waited: list[Any]

    def captures(self, like: Any) -> bool:
        return True

    def finish(self, arrays: Any) -> None:
        self.waited.extend(arrays)


def test_tables_of_captured_calls_are_never_given_back() -> None:
    import gc
    import weakref

    backend, like = _Capturing(xp), xp.ones(2)
    backend.tables = Tables(1)
    backend.waited = []
    first = weakref.ref(backend.table(np.arange, 3, like=like))
    backend.table(np.arange, 4, like=like)
    assert len(backend.waited) == 1
    backend.waited.clear()
    gc.collect()
    assert first() is not None


def test_objects_that_only_look_like_arrays() -> None:
    """Of a class that inherits what another library offers, or that the standard's functions do not serve."""

    class Operators(np.lib.mixins.NDArrayOperatorsMixin):
        shape, ndim, dtype, device = (2, 3), 2, np.dtype("float64"), "cpu"

        def __array_namespace__(self, api_version: Any = None) -> Any:
            return np.linalg

    class Deviceless:
        shape, ndim, dtype = (2, 3), 2, np.dtype("float64")

        def __array_namespace__(self, api_version: Any = None) -> Any:
            return np

    for odd, lacking in ((Operators(), "abs, all, any, arange, argsort and"), (Deviceless(), "device of")):
        with pytest.raises(TypeError, match=f"query should be an array, got .*, which lacks {lacking}"):
            tattn.tensor_attention(odd, [odd], [odd])
    with pytest.raises(TypeError, match="got a NumPy scalar"):
        tattn.tensor_attention(np.float64(1), [np.ones((3, 2))], [np.ones((3, 2))])


def test_attributes_are_others_for_a_while() -> None:
    backend = Backend(xp)
    backend.cache = 5
    with pytest.raises(KeyError), backend.using(workspace=7, cache=6, threads=lambda: 3):
        assert (backend.workspace, backend.cache, backend.threads()) == (7, 6, 3)
        with backend.using(workspace=8):
            assert (backend.workspace, backend.cache) == (8, 6)
        assert backend.workspace == 7
        raise KeyError
    assert (backend.workspace, backend.cache, backend.threads()) == (Backend.workspace, 5, 1)
    with pytest.raises(AttributeError, match=r"^a backend has no 'wrokspace'$"), backend.using(wrokspace=7):
        pass
