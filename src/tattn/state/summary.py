"""Attention to keys and values that come in pieces: summaries that add up, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..arrays import are_weights, with_leading
from ..backends import Array, Backend, backend_of
from ..backends.operations import CHAIN
from ..backends.progress import Progress, finish, reporter
from ..bounds.rounding import computed_in
from ..checks import (
    checked_array,
    checked_flags,
    checked_gradients,
)
from ..decay import passed
from ..engines.chunks import SPANS
from ..features.monomials import Expansion
from ..files import Path
from ..operands import View
from ..plans import Plan
from ..weights import as_given, weights_of_view
from . import saved
from . import sums as summaries
from .checks import (
    Views,
    check_same_plan,
    check_streams,
    checked_addends,
    checked_parts,
    checked_reader,
    checked_sums,
    checked_views,
)

_PIECE = 1 << 18


@dataclass(frozen=True, eq=False)
class Summary:
    r"""What attention needs to know about keys and values, in an amount of memory that does not depend on their number.

    Made by `summarize`. Summaries of different rows add up, ``s1 + s2``, in any order and grouping. A query that
    attends to the sum attends to all pairs (triples, …) of the rows of both. Rows can be added to a single view: with
    views a and b, scores run over all pairs (j, k) of a row of a and a row of b, whatever their numbers. Immutable: no
    method changes the arrays, and you should not either.

    Attributes
    ----------
    plan : Plan
        The plan of all calls with the summary. Its `error` is certified if the plan is, and if all queries and rows
        together keep its bound. Bounds are never checked here, whatever ``plan.source`` says.
    sums : tuple of m arrays (..., r, dv + 1)
        Φ(keys_μ)ᵀ [values_μ, 1] for r = ``plan.rank`` monomials, in float64 for float64 inputs and else in float32.
        Gradients pass through the sums, and another worker needs only these.
    rests : tuple of m arrays (..., r, dv + 1)
        The compensation: what rounding took from the sums, so that sums + rests has twice the digits. Constants for
        every gradient. Zeros are allowed.

    Notes
    -----
    In JAX a summary is a pytree of arrays and a constant plan. In torch autograd passes through its sums. With many
    workers, each summarizes its rows, and the summaries are added. Each worker then pulls the gradient of the sum,
    ``dsums``, back to its rows.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> rng = np.random.default_rng(0)
    >>> plan = tattn.plan_for(n=1000, dim=4, bound=1.0, dtype="float64")
    >>> query, *keys = rng.uniform(-1, 1, (3, 1000, 4))
    >>> values = list(rng.normal(size=(2, 1000, 4)))
    >>> first = tattn.summarize([k[:300] for k in keys], [v[:300] for v in values], plan)
    >>> rest = tattn.summarize([k[300:] for k in keys], [v[300:] for v in values], plan)
    >>> out = (first + rest).attend(query)
    >>> np.allclose(out, tattn.tensor_attention(query, keys, values, plan=plan))
    True
    """

    plan: Plan
    sums: tuple[Array, ...] = field(repr=False)
    rests: tuple[Array, ...] = field(repr=False)

    def __post_init__(self) -> None:
        # Transformations put all sorts of things in the place of arrays.
        backend = backend_of(self.sums[0]) if isinstance(self.sums, tuple) and self.sums else None
        if backend is not None:
            backend.as_container(Summary, ("sums", "rests"), ("plan",))

    @property
    def counts(self) -> tuple[Array, ...]:
        """Number of rows in every view, by weight and without masked ones: m arrays (...)."""
        self._checked()
        return tuple(s[..., 0, -1] for s in self.sums)

    def __add__(self, other: Summary) -> Summary:
        """The summary of the rows of both, exact up to rounding at twice the digits.

        Leading dimensions broadcast.

        Raises
        ------
        PlanError
            If the plans differ in more than shapes and costs; it names the difference.
        TypeError, ValueError
            For another library, device or number of value channels.
        """
        if not isinstance(other, Summary):
            return NotImplemented
        check_same_plan(self.plan, other.plan)
        backend = self._checked()
        other._checked()
        checked_addends(self.sums, other.sums, backend)
        added = [
            backend.run(summaries.add_up, None, pair)
            for pair in zip(self.sums, self.rests, other.sums, other.rests, strict=True)
        ]
        return summary_of(self.plan, added)

    def update(
        self,
        keys: Sequence[Array | None],
        values: Sequence[Array | None],
        key_masks: Sequence[Array | None] | None = None,
        *,
        key_weights: Sequence[Array | None] | None = None,
        decay: Sequence[Array | float | None] | None = None,
        progress: bool | Progress | None = None,
    ) -> Summary:
        """The summary with more rows: a new one, in O(n_μ r dv) for n_μ new rows.

        Parameters
        ----------
        keys, values, key_masks, key_weights, progress
            As in `summarize`; None for a view without new rows.
        decay : sequence of m arrays (...), numbers or None, optional
            As in `summarize`, the same for all rows: those that are there count less by λ for every new row of their view.

        Raises
        ------
        TypeError, ValueError
            For arrays that do not fit the plan or the summary, by name.
        """
        self._checked()
        views = checked_views((keys, values, key_masks, key_weights), self.plan.problem, self.sums)
        return self._with(views.fading(decay), progress)

    def _with(self, views: Views, progress: Any = None) -> Summary:
        """The summary with rows that were checked, and that weigh what they do for the last of them."""
        new, backend = _summed(views, self.plan, progress), views.backend
        pairs: list[tuple[Array, Array]] = []
        for i, (own, more) in enumerate(zip(zip(self.sums, self.rests, strict=True), new, strict=True)):
            if more is not None:
                if views.decays:
                    own = passed(views.views[i].keys.shape[-2], own, views.decays[i], backend)  # type: ignore[union-attr]
                own = backend.run(summaries.add_up, None, (*own, *more))
            pairs.append(own)
        return summary_of(self.plan, pairs)

    def attend(self, query: Array, *, return_lse: bool = False) -> Any:
        """Attention of queries to all pairs (triples, …) of rows in the summary, as from `tensor_attention` with the
        plan.

        Parameters
        ----------
        query : array (..., n, d)
            Of the plan's dtype, and of the summary's library and device. The batch broadcasts with the summary's.
        return_lse : bool
            Also return log Σ exp of the scores, (..., n).

        Returns
        -------
        array (..., n, dv), or a tuple of it and lse
            In the dtype of the query; lse in the dtype of the sums. 0 and −inf if a view has no rows. NaN where the
            normaliser lost its sign (this needs scores beyond the plan's bound), and where entries are too large for
            their powers (Notes of `summarize`). In torch and JAX differentiable with respect to query and summary by
            our own adjoint.

        Raises
        ------
        TypeError, ValueError
            For a query that does not fit, by name.

        Notes
        -----
        O(n r dv) time, O(r dv) memory beyond the output.
        """
        checked_flags(return_lse=return_lse)
        backend, call, arrays = self._reading(query)
        out, lse, _ = backend.differentiable(summaries.read, summaries.read_backward, call, arrays)
        with backend.on_device_of(out):
            out = backend.cast(out, query.dtype)
        return (out, lse[..., 0]) if return_lse else out

    def attend_vjp(self, query: Array, *, return_lse: bool = False) -> tuple[Any, Callable[..., Any]]:
        """Attention, and a function from the gradient of its output to those of query and summary, for any library.

        Parameters
        ----------
        query, return_lse
            As in `attend`.

        Returns
        -------
        out : as from `attend`
        pullback : callable
            ``pullback(grad_out, grad_lse=None) -> (dquery, dsums)``: arrays in the shapes of `query` and, a tuple, of
            `sums`. The result is the exact derivative of the computed output. If the summary is a sum, `dsums` is the
            gradient of each of its parts (summed over batch dimensions along which a part was broadcast).

        Raises
        ------
        TypeError, ValueError
            As from `attend`; from the pullback for gradients that do not fit, by name.

        Notes
        -----
        Twice the time of `attend`, with memory of the same order.
        """
        checked_flags(return_lse=return_lse)
        backend, call, arrays = self._reading(query)
        computed, lse, rest = backend.differentiable(summaries.read, summaries.read_backward, call, arrays)
        with backend.on_device_of(computed):
            out = backend.cast(computed, query.dtype)

        def pullback(grad_out: Array, grad_lse: Array | None = None) -> tuple[Array, tuple[Array, ...]]:
            upstream = checked_gradients(grad_out, grad_lse, out, lse, backend)
            residuals = backend.residuals(summaries.read, call, arrays, (computed, rest))
            dquery, *dsums = backend.run(summaries.read_backward, call, (*arrays, *residuals, *upstream))
            return dquery, tuple(dsums)

        return ((out, lse[..., 0]) if return_lse else out), pullback

    def save(self, path: Path) -> None:
        """Write plan, sums and rests to an ``.npz`` file. A file of this name is replaced only when the new one is
        complete.

        Parameters
        ----------
        path : str, bytes or os.PathLike
            A link stays, and its target is replaced. The new file has the mode of the old one.

        Raises
        ------
        ValueError
            If the plan contradicts itself: `load` would refuse it.
        OSError
            If the file cannot be written. A file of this name is then unchanged.

        Notes
        -----
        Threads and processes may save to one path at once. Each writes its own file, ``.tattn-….part`` in the same
        folder, and in the end one of them is at the path. A ``.part`` file stays only if the process is killed.
        """
        backend = self._checked()
        parts = {"sums": self.sums, "rests": self.rests}
        saved.write(
            path, self.plan, {name: [backend.to_numpy(a) for a in backend.values_of(x)] for name, x in parts.items()}
        )

    @classmethod
    def load(cls, path: Path, *, like: Array | None = None) -> Summary:
        """A summary from a file that `save` wrote, in NumPy or in the library and on the device of the array `like`.

        Raises
        ------
        TypeError
            If `like` is not an array, or is a Dask array.
        ValueError
            If the file was not written by `save`, is damaged, contradicts itself, or was written by another version.
        OSError
            If it cannot be read.

        Notes
        -----
        It takes no more memory than the file has bytes, whatever the file says. Nothing is unpickled, evaluated or
        uncompressed. Headers are compared with each other and with the plan before numbers are read. The plan must be
        consistent, but nobody can check that its bound and error are true: they are as reliable as the source of the
        file.
        """
        backend = None if like is None else checked_array("like", like)
        plan, of_views = saved.read(path)
        views = plan.order - 1
        if backend is not None:
            device, dtype = backend.device(like), str(of_views[0].dtype)
            of_views = [backend.xp.asarray(a, device=device) for a in of_views]
            if backend.dtype_name(of_views[0].dtype) != dtype:
                raise ValueError(f"like should be of a library that is set up for {dtype}, {backend.name} is not")
        return cls(plan, tuple(of_views[:views]), tuple(of_views[views:]))

    def _checked(self) -> Backend:
        return checked_parts(self.plan, self.sums, self.rests)

    def _reading(self, query: Array) -> tuple[Backend, summaries.SumCall, tuple[Array, ...]]:
        self._checked()
        backend = checked_reader(query, self.sums, self.plan.dim, self.plan.dtype)
        return backend, call_of(self.plan), (query, *self.sums)


def attend_next(
    plan: Plan, summary: Summary | None, query: Array, given: tuple[Any, Any, Any, Any], decay: Any
) -> tuple[Array, Array, Summary]:
    """Output (..., n, dv), lse (..., n) and the summary after n rows that follow one, each of which sees those up to its own.

    Of (keys, values, key_masks, key_weights), n rows in every view, and what `update` takes for decay.
    """
    if summary is not None:
        summary._checked()
    views = checked_views(given, plan.problem, () if summary is None else summary.sums)
    if summary is None:
        none = [view.rows(0, 0) for view in views.views if view is not None]
        summary = summarize([view.keys for view in none], [view.values for view in none], plan)
    backend, faded = views.backend, views.fading(decay)
    after = summary._with(faded)
    checked_reader(query, after.sums, plan.dim, plan.dtype)
    rows: list[View] = [view for view in views.views if view is not None]
    # A sum that rows are added to has all of its leading dimensions from the first.
    sums = [
        with_leading(own, tuple(new.shape[:-2]), backend) for own, new in zip(summary.sums, after.sums, strict=True)
    ]
    # Plans for rows that all see count with no second chain.
    few = CHAIN if plan.causal else CHAIN // (2 * max(SPANS))
    out, lse = read_following(call_of(plan)._replace(chunks=few), query, rows, sums, faded.decays)
    with backend.on_device_of(out):
        out = backend.cast(out, query.dtype)
    return out, lse[..., 0], after


def read_following(
    call: summaries.SumCall, query: Array, rows: Sequence[View], sums: Sequence[Array], decays: Sequence[Array] = ()
) -> tuple[Array, Array]:
    """`summaries.read_next`, differentiable where the library is: output in the dtype of the computation, and lse (..., n, 1).

    Of rows that follow those of the sums (..., r, dv + 1), and factors (..., 1, 1) by which keys decay, if they do.
    """
    backend = backend_of(query)
    assert backend is not None
    if decays or any(are_weights(view.mask, backend) for view in rows):
        # Those of all views have weights, or none.
        rows = [
            view
            if are_weights(view.mask, backend)
            else view._replace(mask=backend.run(weights_of_view, None, (view.keys, view.mask, None))[0])
            for view in rows
        ]
    of_sums = []
    for view, own in zip(rows, sums, strict=True):
        leading = tuple(own.shape[:-2])
        mask = with_leading(view.mask, leading, backend) if decays else view.mask
        of_sums.append(View(with_leading(view.keys, leading, backend), view.values, mask))
    arrays = (
        query,
        *(v.keys for v in of_sums),
        *(v.values for v in of_sums),
        *sums,
        *(v.mask for v in of_sums),
        *decays,
    )
    call = call._replace(decays=bool(decays))
    out, lse, _ = backend.differentiable(summaries.read_next, summaries.read_causal_backward, call, arrays)
    return out, lse


def summarize(
    keys: Sequence[Array | None],
    values: Sequence[Array | None],
    plan: Plan,
    *,
    key_masks: Sequence[Array | None] | None = None,
    key_weights: Sequence[Array | None] | None = None,
    decay: Sequence[Array | float | None] | None = None,
    progress: bool | Progress | None = None,
) -> Summary:
    """Summarize keys and values, to attend to them later, elsewhere, or together with others.

    Parameters
    ----------
    keys : sequence of m arrays (..., n_μ, d), or None
        Of the plan's dtype, and of one library and device. Lengths may differ and may be 0; None stands for a view
        without rows. Rows are read in blocks, so a ``numpy.memmap`` may be larger than memory.
    values : sequence of m arrays (..., n_μ, dv), or None
    plan : Plan
        Polynomial and not banded, the same for all summaries that will be added: ``tattn.plan_for(..., bound=...)``,
        whose bound you promise. The shapes it was made for do not matter.
    key_masks : boolean array (..., n_μ), or sequence of m of them or None, optional
        True for rows that count. One array serves all views.
    key_weights : array (..., n_μ), or sequence of m of them or None, optional
        As in `tensor_attention`, in one unit for all summaries that will be added. Values are never read: weights that
        are negative or infinite give NaN.
    decay : sequence of m arrays (...), numbers or None, optional
        As in `tensor_attention`: a row t rows before the last of its view has the weight λ^t besides, so the summary is what a
        causal call has at its last row. Summaries that are added have to stand for the same last row. Values are never read:
        factors that are not from 0 to 1 give NaN.
    progress : callable or True, optional
        Called as ``progress(done, total)`` with numbers of rows, after every 262,144; True shows a bar by tqdm.

    Returns
    -------
    Summary
        In torch and JAX differentiable with respect to keys and values by our own adjoint.

    Raises
    ------
    PlanError
        For a plan that is exact or banded.
    TypeError, ValueError
        For arguments that do not fit, by name, before anything is computed.
    ImportError
        With ``progress=True`` if tqdm is not installed.

    Notes
    -----
    O(n_μ r dv) time, O(r dv) memory. Lemmas 4.5 and F.1 of arXiv 2405.16411.

    Channels are multiplied by factors that depend on scale and order alone: keys by the power of two next to
    scale^(1/order), the query by the rest of the scale. So the views should have similar size: if rows of one view are
    a thousand times larger than those of another, multiply the views by λ and 1/λ first. In float32 no |entry| times
    its factor may exceed 2^(103/(m g)) for degree g, 7,500 for two views and degree 4, 35 for degree 10; in float64
    2^(970/(m g)). Above this the output is NaN.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> plan = tattn.plan_for(n=10**6, dim=4, bound=1.0, tol=1e-2)
    >>> rows = np.zeros((50, 4), np.float32)
    >>> summary = tattn.summarize([rows, None], [rows, None], plan)
    >>> [float(n) for n in summary.update([rows, rows[:9]], [rows, rows[:9]]).counts]
    [100.0, 9.0]
    """
    check_streams(plan)
    views = checked_views((keys, values, key_masks, key_weights), plan.problem).fading(decay)
    return summary_of(plan, _filled(_summed(views, plan, progress), views, plan))


def summarize_vjp(
    keys: Sequence[Array | None],
    values: Sequence[Array | None],
    plan: Plan,
    *,
    key_masks: Sequence[Array | None] | None = None,
    key_weights: Sequence[Array | None] | None = None,
) -> tuple[Summary, Callable[..., Any]]:
    """Summary, and a function from the gradient of its sums to those of keys and values, for any library.

    Parameters
    ----------
    keys, values, plan, key_masks, key_weights
        As in `summarize`.

    Returns
    -------
    summary : Summary
    pullback : callable
        ``pullback(dsums) -> (dkeys, dvalues)`` for a sequence of m arrays in the shapes of ``summary.sums``: tuples of
        arrays, each in the shape and dtype of its input, None for views that are None. With `key_weights` a tuple of
        their gradients follows, one for each view.

    Raises
    ------
    TypeError, ValueError, PlanError
        As from `summarize`. From the pullback for `dsums` that do not fit, by name.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> plan = tattn.plan_for(n=100, dim=4, bound=1.0, dtype="float64")
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 100, 4))
    >>> summary, to_rows = tattn.summarize_vjp(keys, keys, plan)
    >>> out, to_summary = summary.attend_vjp(query)
    >>> dquery, dsums = to_summary(np.ones_like(out))
    >>> dkeys, dvalues = to_rows(dsums)
    >>> dkeys[0].shape
    (100, 4)
    """
    check_streams(plan)
    views = checked_views((keys, values, key_masks, key_weights), plan.problem)
    backend, call = views.backend, call_of(plan)
    computed = [None if rows is None else _sums(rows, call, backend) for rows in views.views]
    pairs = [None if c is None else (c[0], c[2]) for c in computed]
    summary = summary_of(plan, _filled(pairs, views, plan))

    def pullback(dsums: Sequence[Array]) -> tuple[tuple[Array | None, ...], ...]:
        checked_sums(
            "dsums", dsums, views=plan.order - 1, rank=plan.rank, dtype=computed_in(plan.dtype), like=summary.sums
        )
        grads: list[tuple[Array | None, ...]] = []
        for rows, column, result, g in zip(views.views, views.weights, computed, dsums, strict=True):
            if rows is None or result is None:
                grads.append((None, None, None))
                continue
            residuals = backend.residuals(summaries.sum_rows, call, rows, (result[0], result[2]))
            with backend.on_device_of(g):
                arrays = (*rows, *residuals, g, backend.xp.zeros_like(result[1]))
            dk, dv, *own = backend.run(summaries.sum_rows_backward, call, arrays)
            grads.append((dk, dv, None if column is None else as_given(own[0], column, backend)))
        found = tuple(zip(*grads, strict=True))
        return found if key_weights is not None else found[:2]

    return summary, pullback


def row_gradients(rows: Sequence[Array | None], dsum: Array, plan: Plan, backend: Backend) -> tuple[Array, ...]:
    """Gradients of keys and values, and of weights if there are, from that of their sums: rows (keys, values, mask or weights
    (..., n, 1) or None) of one view.
    """
    # Linear in the rows' sums, which are not needed for it.
    found: tuple[Array, ...] = backend.run(summaries.sum_rows_backward, call_of(plan), (*rows, None, None, dsum, None))
    return found


def call_of(plan: Plan) -> summaries.SumCall:
    """What `summaries` computes for a plan."""
    expansion = Expansion(plan.coefficients, plan.grading)
    return summaries.SumCall(expansion, plan.scale, plan.order - 1, plan.chain, plan.channels)


def summary_of(plan: Plan, pairs: Sequence[tuple[Array, Array]]) -> Summary:
    """Summary of (sums, rests) for every view."""
    sums, rests = zip(*pairs, strict=True)
    return Summary(plan, sums, rests)


def _sums(rows: Sequence[Array | None], call: summaries.SumCall, backend: Backend) -> tuple[Array, Array, Array]:
    """`summaries.sum_rows` of one view, differentiable where the library is."""
    return backend.differentiable(summaries.sum_rows, summaries.sum_rows_backward, call, rows)


def _summed(views: Views, plan: Plan, progress: Any) -> list[tuple[Array, Array] | None]:
    """(sums, rests) of the rows of every view, None where it is."""
    backend, call = views.backend, call_of(plan)
    report = reporter(progress)
    total = sum(rows.keys.shape[-2] for rows in views.views if rows is not None)
    done = 0
    results: list[tuple[Array, Array] | None] = []
    for rows in views.views:
        if rows is None:
            results.append(None)
            continue
        result: tuple[Array, Array] | None = None
        n = rows.keys.shape[-2]
        # One go, or pieces between which progress is told.
        piece = n if report is None else _PIECE
        for start in range(0, max(n, 1), max(piece, 1)):
            cut = rows if piece >= n else rows.rows(start, start + piece)
            sums, _, rest = _sums(cut, call, backend)
            result = (sums, rest) if result is None else backend.run(summaries.add_up, None, (*result, sums, rest))
            if report is not None:
                done += min(piece, n - start)
                report(done, total)
        results.append(result)
    finish(report)
    return results


def _filled(pairs: Sequence[tuple[Array, Array] | None], views: Views, plan: Plan) -> list[tuple[Array, Array]]:
    """Zeros for the views that are None."""
    like = next(pair[0] for pair in pairs if pair is not None)
    xp, backend = views.backend.xp, views.backend
    shape = (plan.rank, views.value_dim + 1)

    def zeros() -> Array:
        with backend.on_device_of(like):
            return xp.zeros(shape, dtype=like.dtype, device=backend.device(like))

    return [(zeros(), zeros()) if pair is None else pair for pair in pairs]
