"""Documents one after another in the rows: each has the output, errors and gradients that it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import COMPLEX, METHODS
from conftest import Library, make_library
from reference import Dense, dense, value_sizes

import tattn

# Rows of documents: of the query, and as many or more of each view, and numbers that have nothing to do with these.
SELF = (5, 9, 0, 1, 12, 9, 6, 3, 9, 4, 5, 2)
MORE = ((7, 9, 2, 1, 15, 9, 8, 3, 11, 4, 5, 6), (5, 10, 0, 3, 12, 14, 6, 4, 9, 7, 5, 2))
OTHER = ((2, 9, 3, 6, 1, 0, 8, 3, 5, 12, 0, 7), (11, 1, 4, 3, 12, 2, 0, 4, 9, 7, 5, 2))
SIDES = {"one": (SELF,) * 4, "more": (SELF, *MORE), "other": (SELF, *OTHER)}
DIM = 4
# JAX compiles every group of every case.
EAGER = pytest.mark.libraries("numpy", "strict", "torch")
NUMPY = make_library("numpy")


class Packed(NamedTuple):
    """Arrays of all documents, and offsets of query and views."""

    query: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    masks: list[np.ndarray | None] | None
    grad_out: np.ndarray
    grad_lse: np.ndarray
    offsets: list[np.ndarray]

    def rows(self) -> list[list[slice]]:
        """Of every document, in query and views."""
        return [[slice(*pair) for pair in some] for some in zip(*(pairwise(o) for o in self.offsets), strict=True)]

    def document(self, rows: list[slice]) -> Packed:
        """One of them alone."""
        query, *views = rows
        taken = [[x[..., r, :] for x, r in zip(xs, views, strict=True)] for xs in (self.keys, self.values)]
        masks = (
            None
            if self.masks is None
            else [m if m is None else m[..., r] for m, r in zip(self.masks, views, strict=True)]
        )
        return Packed(
            self.query[..., query, :], *taken, masks, self.grad_out[..., query, :], self.grad_lse[..., query], []
        )


def draw(sides: str = "one", masked: bool = False, views: int = 2, heads: bool = False, seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    lengths = SIDES[sides][: views + 1]
    n, *others = (sum(own) for own in lengths)
    batch, shared = ((2, 3), (2, 1)) if heads else ((), ())
    query = rng.uniform(-1, 1, (*batch, n, DIM))
    keys = [rng.uniform(-1, 1, (*shared, k, DIM)) for k in others]
    values = [rng.normal(size=(*shared, k, 3)) for k in others]
    masks: list[np.ndarray | None] | None = None
    if masked:
        masks = [rng.random((*shared[:1], *shared[1:], k)) < 0.7 for k in others]
        masks[-1] = None
    offsets = [np.concatenate([[0], np.cumsum(own)]) for own in lengths]
    return Packed(query, keys, values, masks, rng.normal(size=(*batch, n, 3)), rng.normal(size=(*batch, n)), offsets)


def run(library: Library, call: Packed, alone: bool = False, **options: Any) -> tuple[Dense, np.ndarray, list[Any]]:
    """Output, lse and gradients; errors of rows; and bounds of the errors of gradients."""
    arrays = library.arrays(call.query, call.keys, call.values, call.grad_out, call.grad_lse)
    query, keys, values, grad_out, grad_lse = arrays
    masks = None if call.masks is None else library.arrays(call.masks)
    if not alone:
        options["offsets"] = (
            library.array(call.offsets[0]) if len({*map(bytes, call.offsets)}) == 1 else library.arrays(call.offsets)
        )
    (out, lse, error), pullback = tattn.tensor_attention_vjp(
        query, keys, values, key_masks=masks, return_lse=True, return_error=True, **options
    )
    grads, bounds = pullback(grad_out, grad_lse, return_error=True)
    given = (query, *keys, *values)
    dquery, dkeys, dvalues = grads
    for got, like in zip((dquery, *dkeys, *dvalues), given, strict=True):
        assert tuple(got.shape) == tuple(like.shape) and got.dtype == like.dtype
        assert library.device(got) == library.device(like)
    read = library.numpy
    found = Dense(read(out), read(lse), read(dquery), [*map(read, dkeys)], [*map(read, dvalues)])
    return found, read(error), [read(bounds[0]), *map(read, bounds[1]), *map(read, bounds[2])]


def check(library: Library, call: Packed, tolerance: float, **options: Any) -> None:
    """Everything is what each document has alone, by NumPy."""
    found, error, bounds = run(library, call, **options)
    for rows in call.rows():
        query, *views = rows
        if query.start == query.stop:
            for x, r in zip((*found.dkeys, *found.dvalues, *bounds[1:]), views * 4, strict=True):
                assert not x[..., r, :].any()
            continue
        if any(r.start == r.stop for r in views):
            assert not found.out[..., query, :].any() and not found.dquery[..., query, :].any()
            assert (found.lse[..., query] == -np.inf).all()
            continue
        one, one_error, one_bounds = run(NUMPY, call.document(rows), alone=True, **options)
        close = {"rtol": tolerance, "atol": tolerance}
        np.testing.assert_allclose(found.out[..., query, :], one.out, **close)
        np.testing.assert_allclose(found.lse[..., query], one.lse, **close)
        np.testing.assert_allclose(error[..., query], one_error, **close)
        np.testing.assert_allclose(found.dquery[..., query, :], one.dquery, **close)
        np.testing.assert_allclose(bounds[0][..., query, :], one_bounds[0], **close)
        grads = zip(
            (*found.dkeys, *found.dvalues, *bounds[1:]), (*one.dkeys, *one.dvalues, *one_bounds[1:]), strict=True
        )
        for (got, expected), r in zip(grads, views * 4, strict=True):
            np.testing.assert_allclose(got[..., r, :], expected, **close)


@EAGER
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_of_keys(library: Library, method: str, causal: bool, masked: bool) -> None:
    call, rng = draw("more", masked), np.random.default_rng(1)
    weights = [rng.uniform(0.5, 2, len(k)) * (rng.random(len(k)) < 0.8) for k in call.keys]
    degree = None if method == "exact" else 5
    promise = {"n": 20, "dim": DIM, "value_dim": 3, "bound": 1.5, "causal": causal, "dtype": "float64"}
    plan = tattn.plan_for(**promise, method=method, degree=degree)

    def computed(call: Packed, weights: list[np.ndarray], offsets: Any) -> list[Any]:
        query, keys, values, masks, grad_out, grad_lse, given = library.arrays(*call[:6], weights)
        options = {} if offsets is None else {"offsets": library.arrays(offsets)}
        (out, lse), pullback = tattn.tensor_attention_vjp(
            query,
            keys,
            values,
            key_masks=masks,
            key_weights=given,
            plan=plan,
            causal=causal,
            return_lse=True,
            **options,
        )
        dquery, dkeys, dvalues, dweights = pullback(grad_out, grad_lse)
        return [library.numpy(x) for x in (out, lse, dquery, *dkeys, *dvalues, *dweights)]

    found = computed(call, weights, call.offsets)
    for query, *views in call.rows():
        if query.start == query.stop:
            continue
        one = call.document([query, *views])
        alone = computed(one, [w[r] for w, r in zip(weights, views, strict=True)], None)
        for got, expected, rows in zip(found, alone, [query] * 3 + views * 3, strict=True):
            np.testing.assert_allclose(got[rows], expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=["groups", "few groups"])
def groups(request: pytest.FixtureRequest, library: Library) -> Iterator[None]:
    """As they come, and two at most, in which documents of very different lengths are padded."""
    with library.backend.using(groups=2 if request.param == "few groups" else library.backend.groups):
        yield


@EAGER
@pytest.mark.usefixtures("groups")
@pytest.mark.grid
@pytest.mark.parametrize("method", [m for m in METHODS if m != "banded"])
@pytest.mark.parametrize("sides", list(SIDES))
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_documents_are_calls_of_their_own(
    library: Library, method: str, sides: str, masked: bool, causal: bool
) -> None:
    if causal and (sides == "other" or method == "score by score"):
        # Documents with fewer keys than queries are refused, and causal calls compute features.
        return
    plan = METHODS[method].plan(n=SELF[0], dim=DIM, order=3, causal=causal)
    check(library, draw(sides, masked), 1e-9, plan=plan, causal=causal)


@pytest.mark.libraries("jax")
@pytest.mark.thorough("jax")
@pytest.mark.parametrize(
    ("method", "sides", "masked", "causal"),
    [("exact", "one", True, True), ("polynomial", "more", False, True), ("polynomial", "other", True, False)],
)
def test_documents_of_jax(library: Library, method: str, sides: str, masked: bool, causal: bool) -> None:
    plan = METHODS[method].plan(n=SELF[0], dim=DIM, order=3, causal=causal)
    check(library, draw(sides, masked), 1e-9, plan=plan, causal=causal)


@EAGER
@pytest.mark.parametrize("method", ["exact", "polynomial", "banded"])
@pytest.mark.parametrize("causal", [False, True])
def test_documents_may_weigh_very_little(library: Library, method: str, causal: bool) -> None:
    """Beside others, as long as the dtype has their weights: each is what it is alone."""
    if causal and method == "banded":
        return
    rng, offsets = np.random.default_rng(0), np.array([0, 8, 16])
    query, *keys = rng.uniform(-1, 1, (3, 16, DIM))
    values = list(rng.uniform(1, 2, (2, 16, 1)))
    plan = METHODS[method].plan(n=16, dim=DIM, order=3, causal=causal)
    weights = np.ones(16)

    def computed(weights: np.ndarray) -> list[Any]:
        given = library.arrays(query, keys, values, offsets, weights, np.ones((16, 1)))
        (out, lse), pullback = tattn.tensor_attention_vjp(
            *given[:3], key_weights=given[4], plan=plan, causal=causal, offsets=given[3], return_lse=True
        )
        dquery, dkeys, dvalues, dweights = pullback(given[5])
        return [library.numpy(x) for x in (out, dquery, *dkeys, *dvalues, lse, dweights)]

    *expected, lse, dweights = computed(weights)
    for power in (-60, -520):
        weights[:8] = 2.0**power
        *found, lower, steeper = computed(weights)
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
        np.testing.assert_allclose(lower[:8], lse[:8] + 2 * power * np.log(2), rtol=1e-12)
        np.testing.assert_allclose(steeper[:8], dweights[:8] * 2.0**-power, rtol=1e-12, atol=1e-12 * 2.0**-power)


@EAGER
@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("views", [1, 3])
def test_heads_and_numbers_of_views(library: Library, method: str, views: int) -> None:
    plan = METHODS[method].plan(n=SELF[0], dim=DIM, order=views + 1)
    check(library, draw("one", True, views, heads=True), 1e-9, plan=plan)


@pytest.mark.thorough("jax")
@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_complex_channels(library: Library, method: str) -> None:
    check(library, draw("one", True), 1e-9, plan=COMPLEX[method].plan(n=SELF[0], dim=DIM, order=3))


@pytest.mark.libraries("numpy")
@pytest.mark.parametrize("sides", ["one", "more"])
def test_windows(library: Library, sides: str) -> None:
    check(library, draw(sides, True), 1e-12, window=(3, 4), method="exact")


@pytest.mark.grid
@EAGER
@pytest.mark.usefixtures("groups")
@pytest.mark.grid
@pytest.mark.parametrize("sides", list(SIDES))
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_norm_bands_keep_their_bounds(library: Library, sides: str, masked: bool) -> None:
    """Bands are cut of padded rows, so that their polynomials are others than those of a document alone."""
    call = draw(sides, masked)
    plan = tattn.plan_for(n=9, dim=DIM, value_dim=3, series="banded", degree=3, bands=3, dtype="float64")
    found, error, bounds = run(library, call, plan=plan)
    assert 0 < np.median(error) < 1e-2
    # Gradients do not need the errors of rows.
    arrays = library.arrays(call.query, call.keys, call.values, call.offsets, call.grad_out, call.grad_lse)
    masks = None if call.masks is None else library.arrays(call.masks)
    _, pullback = tattn.tensor_attention_vjp(
        *arrays[:3], key_masks=masks, plan=plan, offsets=arrays[3], return_lse=True
    )
    np.testing.assert_array_equal(library.numpy(pullback(*arrays[4:])[0]), found.dquery)
    for rows in call.rows():
        query, *views = rows
        if any(r.start == r.stop for r in rows):
            continue
        one = call.document(rows)
        grads = {"grad_out": one.grad_out, "grad_lse": one.grad_lse}
        exact = dense(one.query, one.keys, one.values, masks=one.masks, **grads)
        sizes = value_sizes(one.values, one.masks)
        off = np.abs(found.out[query] - exact.out)
        assert (off <= error[query, None] * sizes + 1e-12).all()
        pairs = [(found.dquery[query], exact.dquery, bounds[0][query])]
        of_views = zip(
            (*found.dkeys, *found.dvalues), (*exact.dkeys, *exact.dvalues), bounds[1:], views * 2, strict=True
        )
        pairs += [(got[r], expected, bound[r]) for got, expected, bound, r in of_views]
        for got, expected, bound in pairs:
            assert (np.abs(got - expected) <= bound + 1e-12).all()


@pytest.mark.thorough("jax")
@pytest.mark.parametrize("options", [{}, {"method": "polynomial"}, {"causal": True}, {"tol": 1e-6}], ids=str)
def test_plans_that_are_made_for_documents(library: Library, options: dict[str, Any]) -> None:
    """One plan for all documents, with an error that each of them keeps; and it serves the same call again."""
    call = draw("one")
    query, keys, values, offsets = library.arrays(call.query, call.keys, call.values, call.offsets[0])
    asked = {**options, "offsets": offsets, "return_error": True, "return_plan": True}
    out, error, plan = tattn.tensor_attention(query, keys, values, **asked)
    again = tattn.tensor_attention(query, keys, values, plan=plan, causal=plan.causal, offsets=offsets)
    np.testing.assert_array_equal(library.numpy(again), library.numpy(out))
    assert plan.error <= options.get("tol", 1e-3) and plan.certified
    assert (library.numpy(error) == plan.error).all()
    for rows in call.rows():
        if rows[0].start == rows[0].stop:
            continue
        one = call.document(rows)
        exact = dense(one.query, one.keys, one.values, causal=plan.causal)
        off = np.abs(library.numpy(out)[rows[0]] - exact.out)
        assert (off <= plan.error * value_sizes(one.values)).all()


def test_the_exact_method_counts_with_the_longest_document() -> None:
    lengths = np.array([3] * 50 + [400])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, offsets[-1], DIM))
    options = {"method": "exact", "return_error": True, "return_plan": True}
    plan = tattn.tensor_attention(query, keys, keys, offsets=offsets, **options)[-1]
    longest = tattn.Exact().guarantee(plan.problem, plan.scores)
    assert plan.error > longest.error
    # As many scores as there are, and not those of one long document.
    assert plan.flops_exact == pytest.approx((50 * 27 + 400.0**3) * 32, rel=0.01)


@pytest.mark.parametrize("sides", list(SIDES))
def test_values_that_no_bound_serves(sides: str) -> None:
    """Only rows of a document whose values multiply to what arithmetic loses have an infinite error."""
    call = draw(sides)
    rows = call.rows()[4]
    for value, r in zip(call.values, rows[1:], strict=True):
        value[r] *= 1e-170
    plan = METHODS["polynomial"].plan(n=9, dim=DIM, order=3)
    _, error, _ = run(NUMPY, call, plan=plan)
    spoiled = np.zeros(len(error), bool)
    spoiled[rows[0]] = True
    np.testing.assert_array_equal(np.isinf(error), spoiled)


@pytest.mark.libraries("numpy")
@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("causal", [False, True])
def test_documents_do_not_spoil_each_other(library: Library, method: str, causal: bool) -> None:
    call = draw("one")
    plan = METHODS[method].plan(n=9, dim=DIM, order=3, causal=causal)
    clean, *_ = run(library, call, plan=plan, causal=causal)
    rows = call.rows()[4][0]
    for x in (call.query, call.keys[0], call.values[1]):
        x[rows] = np.nan
    spoiled, *_ = run(library, call, plan=plan, causal=causal)
    others = np.ones(len(call.query), bool)
    others[rows] = False
    pairs = zip((clean.out, clean.dquery, *clean.dkeys, *clean.dvalues),
                (spoiled.out, spoiled.dquery, *spoiled.dkeys, *spoiled.dvalues), strict=True)  # fmt: skip
    for before, after in pairs:
        np.testing.assert_allclose(after[others], before[others], rtol=1e-12, atol=1e-12)
    assert np.isnan(spoiled.out[rows]).all()


@pytest.mark.libraries("torch")
@pytest.mark.thorough
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_torch(causal: bool) -> None:
    torch = pytest.importorskip("torch")
    call = draw("more", True)
    plan = METHODS["polynomial"].plan(n=9, dim=DIM, order=3, causal=causal)
    offsets = [torch.tensor(o) for o in call.offsets]
    mask = torch.tensor(call.masks[0])
    given = [torch.tensor(x, requires_grad=True) for x in (call.query, *call.keys, *call.values)]
    options = {"plan": plan, "causal": causal, "offsets": offsets, "key_masks": [mask, None]}
    _, pullback = tattn.tensor_attention_vjp(given[0], given[1:3], given[3:], **options)
    grad = torch.tensor(call.grad_out)
    dquery, dkeys, dvalues = pullback(grad)

    def attend(*given):
        return tattn.tensor_attention(given[0], given[1:3], given[3:], **options)

    recorded = torch.autograd.grad(attend(*given), given, grad)
    of_func = torch.func.vjp(attend, *given)[1](grad)
    for expected, *found in zip((dquery, *dkeys, *dvalues), recorded, of_func, strict=True):
        for got in found:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # Second derivatives, and the forward mode.
    few = [x[..., :5, :2].detach().requires_grad_() for x in (given[0], given[1], given[3])]
    short = torch.tensor([0, 2, 5])

    def one(q, k, v):
        return tattn.tensor_attention(q, [k], [v], plan=plan_of_one, causal=causal, offsets=short)

    plan_of_one = METHODS["polynomial"].plan(n=9, dim=2, order=2, causal=causal)
    assert torch.autograd.gradcheck(one, few, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(one, few)


@pytest.mark.thorough
@pytest.mark.libraries("jax")
def test_gradients_of_jax() -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    call = draw("one")
    plan = METHODS["polynomial"].plan(n=9, dim=DIM, order=3)
    given = [jax.numpy.asarray(x) for x in (call.query, *call.keys, *call.values)]
    grad, offsets = jax.numpy.asarray(call.grad_out), call.offsets[0]

    def attend(*given):
        return tattn.tensor_attention(given[0], given[1:3], given[3:], plan=plan, offsets=offsets)

    _, pullback = tattn.tensor_attention_vjp(given[0], given[1:3], given[3:], plan=plan, offsets=offsets)
    dquery, dkeys, dvalues = pullback(grad)
    # Known offsets serve compiled calls, too.
    loss = jax.jit(jax.grad(lambda given: (attend(*given) * grad).sum()))
    for got, expected in zip(loss(given), (dquery, *dkeys, *dvalues), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match=r"^offsets should be numbers that are known when the call is made"):
        jax.jit(lambda o: tattn.tensor_attention(given[0], given[1:3], given[3:], plan=plan, offsets=o))(offsets)


N = len(draw().query)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ([0, N], TypeError, "offsets should be an array, or a sequence of arrays, got a list of numbers"),
        ((0, 3, N), TypeError, "offsets should be an array, .*, got a tuple of numbers"),
        (["x", None, 1.5], TypeError, r"offsets\[0\] should be an array .*, got str"),
        ("x", TypeError, r"offsets should be an array .*, got str"),
        (np.array([0.0, N]), TypeError, "offsets should hold whole numbers, got dtype float64"),
        (np.array([False, True]), TypeError, "offsets should hold whole numbers, got dtype bool"),
        (np.array([[0, N]]), ValueError, r"offsets should be an array \(documents \+ 1,\) .*, got shape \(1, 2\)"),
        (np.array([0]), ValueError, r"offsets should be an array .* of at least two numbers, got shape \(1,\)"),
        (np.array([1, N]), ValueError, f"offsets should go from 0 to {N}, the rows of query, got 1 to {N}"),
        (np.array([0, N - 1]), ValueError, f"offsets should go from 0 to {N}, the rows of query, got 0 to {N - 1}"),
        (np.array([0, 9, 8, N]), ValueError, "offsets should not descend, got 9 before 8"),
        ([np.array([0, N])] * 2, ValueError, "offsets should be one array, or 3 of them, for query .*, got 2"),
        (
            [np.array([0, N]), np.array([0, 2, N]), np.array([0, N])],
            ValueError, r"offsets\[1\] should have as many documents as offsets\[0\], 1, got 2",
        ),
        (
            [np.array([0, N]), np.array([0, N]), np.array([0, N + 1])],
            ValueError, rf"offsets\[2\] should go from 0 to {N}, the rows of keys\[1\], got 0 to {N + 1}",
        ),
    ],
)  # fmt: skip
def test_offsets_that_do_not_fit(given: Any, error: type[Exception], text: str) -> None:
    call = draw()
    with pytest.raises(error, match=f"^{text}"):
        tattn.tensor_attention(call.query, call.keys, call.values, offsets=given)


def test_offsets_of_other_rows_than_those_of_the_query() -> None:
    call = draw("other")
    with pytest.raises(ValueError, match=r"^offsets should be 3 arrays, for query and each view, since keys\[0\] has"):
        tattn.tensor_attention(call.query, call.keys, call.values, offsets=call.offsets[0])
    whole = [np.array([0, 5, len(x)]) for x in (call.query, *call.keys)]
    whole[1][1] = 4
    with pytest.raises(
        ValueError, match=r"^offsets\[1\] should give a document at least as many rows .* for document 0$"
    ):
        tattn.tensor_attention(
            call.query, [np.ones((70, DIM))] * 2, [np.ones((70, 3))] * 2, causal=True,
            offsets=[whole[0], np.array([0, 4, 70]), np.array([0, 5, 70])],
        )  # fmt: skip


def test_scores_are_those_within_documents() -> None:
    """Means of keys that cancel over all documents do not within one, and no bound is that of rows of several."""
    signs = np.repeat([1.0, -1.0], 20)[:, None]
    query, first, second = np.ones((40, DIM)), signs * np.ones((40, DIM)), np.ones((40, DIM))
    second[:20] *= 1e-3
    first[20:] *= 0.5
    offsets = np.array([0, 20, 40])
    options = {"method": "polynomial", "offsets": offsets, "return_plan": True}
    _, plan = tattn.tensor_attention(query, [first, second], [query, query], **options)
    assert -0.52 < plan.lowest_mean <= -0.5 and plan.bound < 0.6


@pytest.mark.libraries("torch")
@pytest.mark.parametrize(
    "options", [{"offsets": [0, 20, 50]}, {"window": (7,), "causal": True}], ids=["packed", "windows"]
)
def test_outputs_of_torch_may_be_changed_in_place(options: dict[str, Any]) -> None:
    """As those of other calls: none is a view of what the call held."""
    import torch

    query, key = torch.rand(50, 3, requires_grad=True), torch.rand(50, 3)
    if "offsets" in options:
        options = {"offsets": torch.tensor(options["offsets"])}
    plan = tattn.plan_for(n=50, dim=3, order=2, bound=3.0, degree=3, window=options.get("window"))
    out = tattn.tensor_attention(query, [key], [key], plan=plan, **options)
    expected = out.detach() + 1
    torch.testing.assert_close(out.add_(1).detach_(), expected)
