"""The layer as a torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import tensor_attention
from ..backends.torch import BACKEND
from ..checks import FLOATS, PlanError, checked_dtype, checked_flags, checked_kind
from ..planning.program import written
from ..plans import Plan
from ..state.decoding import DecodingState
from ..state.summary import summarize
from .checks import BROUGHT_TO_CALLS, BROUGHT_TO_LAYERS, check_offsets, check_served, checked_layer_call, refuse_brought
from .config import USUAL_ROWS, AttentionConfig, of_step, plan_of_call, plans_of
from .heads import Counted, Learned, attend
from .operator import planned_attention, traced_whole
from .serving import ServingState, check_state, restored_state

# A learned bound starts at the logistic function of this, 88 % of the bound: close to it, and with a slope left.
LOGIT = 2.0


class TensorAttention(nn.Module):
    r"""Several heads of tensor attention, bounded by construction: linear in the length, with a known error.

    Takes the place of ``nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)``. For order 3, head h of row i
    is

    .. math::

        o_i = \sum_{jk} \mathrm{softmax}_{jk}\Big(\mathrm{bound} \sum_c \hat q_{ic} \hat a_{jc} \hat b_{kc}\Big)\; u_j \circ v_k,

    where q is a projection of `x`; a, u and b, v are projections of the two contexts; and a hat divides a row by its
    ℓ3-norm. No score exceeds `bound`, whatever the weights become. So the polynomial in place of exp is chosen once,
    when the layer is built, and no call reads values. The layer runs without host synchronisation and can be traced by
    ``torch.compile``, ``torch.func``, ``torch.export`` and, without `decay`, ``torch.jit.trace``. Its gradient is the exact
    derivative of what it computes.

    Parameters
    ----------
    embed_dim : int
        Channels of the input and the output.
    num_heads : int
        Query heads.
    order : int
        Number of views plus one: 3 attends to pairs, 2 is ordinary attention.
    head_dim : int, optional
        Channels d of query and keys in a head; embed_dim / num_heads if not given, and 8 where that is more. The rank,
        which time and memory are proportional to, is C(d + degree, degree).
    value_dim : int, optional
        Channels of the values in a head; embed_dim / num_heads if not given, and `head_dim` where that is no whole number.
    num_key_heads : int, optional
        Heads of keys and values, each shared by num_heads / num_key_heads query heads; `num_heads` if not given.
    context_dims : sequence of order − 1 ints, optional
        Channels of the contexts that are attended to; `embed_dim` each if not given.
    bound : float or None
        Largest |score|; no pair has more than e^(2 · bound) times the weight of another. None does not normalise rows;
        scores are Σ_c q_c a_c b_c / d, and their range depends on the data. With a `degree`, calls then use norm bands
        of this degree, which need no range and return an error for each row. Without a `degree`, every call makes a
        plan from the data; it waits for the device and cannot be traced.
    learn_bound : bool
        Learn a factor t of `bound` for each head: the logistic function of a parameter, so it is never above 1.
    tol : float, optional
        Largest distance of a head's output from attention with exp, in channel e relative to the product over the views
        of their largest |value| in channel e. It chooses the least degree that meets it. Not used if `degree` is given.
        1e-3 where neither is given and no degree is fixed: with another method than "polynomial", or without a bound.
    degree : int, optional
        Degree of the polynomial that takes the place of exp, whatever its distance to exp. If neither `degree` nor
        `tol` is given, 4.
    method : {"polynomial", "exact", "auto"}
        "auto" takes the exact method if it needs fewer operations for the lengths of the call; both are within `tol`.
        The others are the same function at every length.
    max_rank : int
        Largest rank to accept, at most 262,144. A head's summary of one view holds rank · (value_dim + 1) numbers.
    eps : float
        Rows much shorter than this stay short. Gradients of the normalisation stay below 1/eps.
    bias : bool
        Whether projections have a bias.
    causal : bool
        Row i sees the rows of the contexts up to its own, aligned at the end. Contexts need at least as many rows as
        the input. Not with norm bands.
    window : int or sequence of order − 1 ints, optional
        Row i sees only the last so many of these rows, of every view or of each. Implies `causal`. The time
        of the polynomial method does not depend on windows; that of method="exact" is proportional to their product.
    positions : {None, "rotary"}
        "rotary": scores depend on how far the rows of a pair stand from the query row. Channels are complex, half as many of
        them as `head_dim`, and turn with the position (`tattn.rotary`), at the same rank and bound. In causal calls
        positions are aligned at the end, as rows are.
    base : float
        Frequencies go from 1 down to about 1 / `base` radians a row, in equal ratios over channels, heads of keys and views.
    learn_frequencies : bool
        Learn them from there, (order − 1, num_key_heads, head_dim / 2).
    decay : {None, "alibi"}, number, or sequence of order − 1 numbers or sequences of num_key_heads numbers
        Rows count less, the further before a row they stand: one t rows before the last that a row sees has the weight λ^t besides,
        for a factor λ from 0 to 1 of each view and head of keys (`tattn.tensor_attention`). "alibi": λ = exp(−2^(−8 h / K)) for
        heads h = 1 … K of keys, alike in all views. Needs `causal` or `window`. Rank, bound and errors stay as they are.
    learn_decay : bool
        Learn the factors from there, (order − 1, num_key_heads): the logistic function of a parameter, so λ is never above 1.
    device, dtype
        Of the weights. The attention computes in float64 if they are float64, and in float32 otherwise, also under
        autocast.

    Attributes
    ----------
    config : AttentionConfig
    plan : Plan or None
        Degree, rank and error of a head in the weights' dtype, with costs counted for one head and 16,384 rows.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name.
    PlanError
        If no polynomial serves this bound and head dimension; the message says what would do.

    Notes
    -----
    There is no dropout of attention weights: they are never formed. Put dropout on the output.

    Projections start at variance 1/fan-in. So values, and products of values, have the variance of the inputs. The size
    of queries and keys is divided out. Biases start at 0.

    Examples
    --------
    >>> import torch, tattn
    >>> layer = tattn.nn.TensorAttention(64, 8)
    >>> layer.plan.degree, layer.plan.rank
    (4, 495)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    >>> text, image, audio = (torch.randn(2, n, width) for n, width in ((30, 64), (40, 48), (50, 32)))
    >>> cross = tattn.nn.TensorAttention(64, 8, bound=1.0, context_dims=(48, 32))
    >>> cross(text, (image, audio)).shape
    torch.Size([2, 30, 64])
    """

    bound_logit: nn.Parameter | None
    frequencies: nn.Parameter | None
    decay_logit: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        order: int = 3,
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_key_heads: int | None = None,
        context_dims: Sequence[int] | None = None,
        bound: float | None = 2.0,
        learn_bound: bool = False,
        tol: float | None = None,
        degree: int | None = None,
        method: str = "polynomial",
        max_rank: int = 1 << 15,
        eps: float = 1e-3,
        bias: bool = True,
        causal: bool = False,
        window: int | Sequence[int] | None = None,
        positions: str | None = None,
        base: float = 10_000.0,
        learn_frequencies: bool = False,
        decay: str | float | Sequence[float | Sequence[float]] | None = None,
        learn_decay: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **brought: Any,
    ) -> None:
        super().__init__()
        refuse_brought("TensorAttention", (), brought, BROUGHT_TO_LAYERS)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        _checked_place(device, dtype)
        self.config = config = AttentionConfig(
            embed_dim, num_heads, order=order, head_dim=head_dim, value_dim=value_dim,  # type: ignore[arg-type]
            num_key_heads=num_key_heads, context_dims=context_dims, bound=bound, learn_bound=learn_bound,  # type: ignore[arg-type]
            tol=tol, degree=degree, method=method, max_rank=max_rank, eps=eps, bias=bias,  # type: ignore[arg-type]
            causal=causal, window=window, positions=positions, base=base,  # type: ignore[arg-type]
            learn_frequencies=learn_frequencies, decay=decay, learn_decay=learn_decay,
        )  # fmt: skip
        # What states of this very layer have in common.
        self._owner = object()
        # For both dtypes now, since a compiler cannot trace how plans are made.
        self._plans = {name: _plans(config, name, name == _computed_in(dtype)) for name in ("float32", "float64")}
        made = {"bias": bias, "device": device, "dtype": dtype}
        heads, key_heads = config.num_heads, config.num_key_heads
        self.q_proj = nn.Linear(embed_dim, heads * config.head_dim, **made)
        self.k_projs = nn.ModuleList(nn.Linear(w, key_heads * config.head_dim, **made) for w in config.context_dims)
        self.v_projs = nn.ModuleList(nn.Linear(w, key_heads * config.value_dim, **made) for w in config.context_dims)
        self.out_proj = nn.Linear(heads * config.value_dim, embed_dim, **made)
        logit = nn.Parameter(torch.empty(heads, device=device, dtype=dtype)) if learn_bound else None
        self.register_parameter("bound_logit", logit)
        shapes = config.parameter_shapes()
        for name in ("frequencies", "decay_logit"):
            own = nn.Parameter(torch.empty(shapes[name], device=device, dtype=dtype)) if name in shapes else None
            self.register_parameter(name, own)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights again."""
        for projection in (self.q_proj, *self.k_projs, *self.v_projs, self.out_proj):
            nn.init.kaiming_uniform_(projection.weight, nonlinearity="linear")
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.bound_logit is not None:
            nn.init.constant_(self.bound_logit, LOGIT)
        if self.frequencies is not None:
            with torch.no_grad():
                self.frequencies.copy_(torch.as_tensor(self.config.frequencies()))
        if self.decay_logit is not None:
            with torch.no_grad():
                self.decay_logit.copy_(torch.logit(torch.as_tensor(self.config.factors().copy())))

    @property
    def plan(self) -> Plan | None:
        """Degree, rank, error and costs of a head; None if `bound` and `degree` are None: every call then makes its own."""
        return self.config.plan(dtype=_computed_in(_weight(self.q_proj).dtype))

    def plan_for(self, n: int | Sequence[int] = USUAL_ROWS) -> Plan | None:
        """`plan` with costs counted for one head and `n` rows, or (n, n_1, …); TypeError or ValueError for what are no lengths."""
        return self.config.plan(n, _computed_in(_weight(self.q_proj).dtype))

    def forward(
        self,
        x: Tensor,
        contexts: Sequence[Tensor] | None = None,
        *further: Any,
        key_masks: Tensor | Sequence[Tensor | None] | None = None,
        key_weights: Tensor | Sequence[Tensor | None] | None = None,
        offsets: Tensor | Sequence[Tensor] | None = None,
        return_error: bool = False,
        **brought: Any,
    ) -> Any:
        """Attend from every row of `x` to all pairs (triples, …) of rows of the contexts.

        Parameters
        ----------
        x : Tensor (..., n, embed_dim)
            In the dtype of the weights, or in one that autocast converts to it.
        contexts : sequence of order − 1 Tensors (..., n_μ, context_dims[μ]), optional
            `x` itself in every view if not given. The batch broadcasts with that of `x`.
        key_masks : boolean Tensor (..., n), or sequence of order − 1 of them (..., n_μ) or None, optional
            True where to attend, as in `tattn.tensor_attention` and ``scaled_dot_product_attention``;
            `tattn.nn.from_key_padding_mask` and `tattn.nn.from_attention_mask` turn those of others into such. A single
            mask is for every view, and for self-attention only. A row with nothing to attend to gets 0 from every head.
        key_weights : Tensor (..., n), or sequence of order − 1 of them (..., n_μ) or None, optional
            As in `tattn.tensor_attention`, in any floating dtype; a single one as with masks.
        offsets : integer Tensor (documents + 1,), or sequence of `order` of them, optional
            For documents that stand one after another in the rows, as in `tattn.tensor_attention`: a row attends within its
            document. One is for `x` and all contexts; otherwise one for `x` and one for each context.
        return_error : bool
            Also return a certified bound of each head's error in each row (..., num_heads, n), measured like `tol`.

        Returns
        -------
        Tensor (..., n, embed_dim), or a pair with the errors

        Raises
        ------
        TypeError, ValueError
            For inputs that do not fit the layer, by name.
        PlanError
            With ``bound=None`` and no degree, as from `tattn.tensor_attention`. Also if the weights were moved to a
            dtype in which the layer cannot be built.
        """
        refuse_brought("layer(x, contexts)", further, brought, BROUGHT_TO_CALLS)
        checked_flags(return_error=return_error)
        weight = _weight(self.q_proj)
        given = x, contexts, key_masks, key_weights
        contexts, counted = checked_layer_call(given, self.config, weight, BACKEND, _served(weight))
        check_offsets(offsets, self.config, x, contexts)

        def attention(q: Any, ks: Any, vs: Any, counted: Any) -> Any:
            return self._attention(q, ks, vs, counted, return_error, offsets)

        out, error = self._attend(attention, (x, contexts, counted), return_error)
        return (out, error) if return_error else out

    def prefill(
        self,
        x: Tensor,
        *,
        key_masks: Tensor | Sequence[Tensor | None] | None = None,
        key_weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, ServingState]:
        """The output of a causal layer for rows to begin with, such as a prompt, and the state to go on from.

        Parameters
        ----------
        x : Tensor (..., n, embed_dim)
        key_masks, key_weights
            As in `forward`: False for the padding of shorter prompts. Weights of all rows of a stream are in one unit.

        Returns
        -------
        out : Tensor (..., n, embed_dim)
            As from the layer itself.
        state : ServingState

        Raises
        ------
        TypeError, ValueError
            As from `forward`; also for a layer that is not causal, attends to other contexts, or is planned from data.

        Notes
        -----
        Memory of the state: 2 · (order − 1) · num_key_heads · rank · (value_dim + 1) numbers for each stream of the
        batch. With the exact method or a window its keys and values, of the last `window` rows if there is one.

        Examples
        --------
        >>> import torch, tattn
        >>> layer = tattn.nn.TensorAttention(16, 4, causal=True)
        >>> x = torch.randn(2, 10, 16)
        >>> out, state = layer.prefill(x[:, :9])
        >>> last, state = layer.step(x[:, 9:], state)
        >>> torch.allclose(last, layer(x)[:, 9:], atol=1e-5)
        True
        """
        plan = self._served_plan()
        weight = _weight(self.q_proj)
        given = x, None, key_masks, key_weights
        contexts, counted = checked_layer_call(given, self.config, weight, BACKEND, _served(weight))
        batch, length = tuple(x.shape[:-2]), x.shape[-2]
        begun: list[ServingState] = []

        def attention(q: Any, ks: Any, vs: Any, counted: Any) -> Any:
            state = ServingState(self.config, length, batch, owner=self._owner)
            if plan is None:
                begun.append(replace(state, rows=self._last(self._kept(ks, vs, counted, batch))))
            else:
                summary = summarize(ks, vs, plan, **counted.options())
                begun.append(replace(state, decoding=DecodingState(plan, summary)))
            return self._attention(q, ks, vs, counted, False)

        return self._attend(attention, (x, contexts, counted), False)[0], begun[0]

    def step(
        self,
        x: Tensor,
        state: ServingState | None = None,
        *,
        key_masks: Tensor | Sequence[Tensor | None] | None = None,
        key_weights: Tensor | Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, ServingState]:
        """The output of a causal layer for the rows that follow, and the new state; `state` itself does not change.

        Parameters
        ----------
        x : Tensor (..., n, embed_dim)
            One row or several, such as drafted tokens or the next part of a prompt. The batch of the state.
        state : ServingState, optional
            From `prefill`, `step` or `restored` of this layer; the rows are the first if not given.
        key_masks, key_weights
            As in `prefill`, for these rows: False for streams that have ended.

        Returns
        -------
        out : Tensor (..., n, embed_dim)
        state : ServingState

        Raises
        ------
        TypeError, ValueError
            As from `prefill`; also for a state of another layer, dtype, device or batch.
        """
        if state is None:
            return self.prefill(x, key_masks=key_masks, key_weights=key_weights)
        plan = self._served_plan()
        weight = _weight(self.q_proj)
        given = x, None, key_masks, key_weights
        contexts, counted = checked_layer_call(given, self.config, weight, BACKEND, _served(weight))
        check_state(state, self.config, self._owner, x, _tensor_dtype(weight.dtype))
        after: list[ServingState] = []

        def attention(q: Any, ks: Any, vs: Any, counted: Any) -> Any:
            out, new = self._stepped(plan, state, q, ks, vs, counted)
            after.append(replace(new, length=state.length + x.shape[-2]))
            return out

        return self._attend(attention, (x, contexts, counted), False, state.length)[0], after[0]

    def restored(self, saved: Mapping[str, Tensor]) -> ServingState:
        """The state that ``state.state_dict()`` holds, for this layer; ValueError or TypeError if it is of another."""
        dtype = _tensor_dtype(_weight(self.q_proj).dtype)
        return replace(restored_state(self.config, self._served_plan(), saved, dtype), owner=self._owner)

    def _served_plan(self) -> Plan | None:
        """The plan of the state's sums; None for keys and values as they are."""
        check_served(self.config)
        if self.config.method == "exact":
            return None
        plans, texts = self._plans[_computed_in(_weight(self.q_proj).dtype)]
        if not plans:
            raise PlanError(texts[0][0])
        # A sum does not forget rows again.
        return None if self.config.window else plans[0]

    def _kept(self, ks: Any, vs: Any, counted: Counted, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Keys, values, and masks or weights of rows."""
        masks = [_in_one(*counted.of_view(view)) for view in range(len(ks))]
        kept = (
            k.new_ones((*batch, 1, 1, k.shape[-2]), dtype=torch.bool)
            if m is None
            else m.expand(*batch, 1, 1, k.shape[-2])
            for m, k in zip(masks, ks, strict=True)
        )
        return *ks, *vs, *kept

    def _last(self, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What later rows see of those that `_kept` returns: all, or as many as the window."""
        views, windows = self.config.views, self.config.window
        if windows is None:
            return tuple(rows)
        keys_and_values, kept = rows[: 2 * views], rows[2 * views :]
        found = [
            x[..., max(0, x.shape[-2] - w) :, :] for x, w in zip(keys_and_values, (*windows, *windows), strict=True)
        ]
        return *found, *(m[..., max(0, m.shape[-1] - w) :] for m, w in zip(kept, windows, strict=True))

    def _stepped(
        self, plan: Plan | None, state: ServingState, query: Tensor, keys: Any, values: Any, counted: Counted
    ) -> tuple[Tensor, ServingState]:
        """The output of rows of all heads, and the state with them but for its length."""
        if plan is not None:
            assert state.decoding is not None
            out, decoding = state.decoding.step(query, keys, values, **counted.options())
            return out, replace(state, decoding=decoding)
        config, views = self.config, self.config.views
        new = self._kept(keys, values, counted, state.batch)
        pairs = zip(state.rows, new, strict=True)
        # A mask beside weights is weights of 0 and 1.
        grown = [torch.cat(pair, dim=-2 if i < 2 * views else -1) for i, pair in enumerate(pairs)]
        ks, vs, seen = (grown[i * views : (i + 1) * views] for i in range(3))
        masks, weights = ([s if s.is_floating_point() == kind else None for s in seen] for kind in (False, True))
        counted = Counted(masks, weights if any(w is not None for w in weights) else None, counted.decays)
        plans, _ = self._plans[_computed_in(query.dtype)]
        out = tensor_attention(
            query, ks, vs, **of_step(config, plans), causal=True, window=config.window, channels=config.channels,
            **counted.options(),
        )  # fmt: skip
        return out, replace(state, rows=self._last(grown))

    def _attend(
        self, attention: Any, given: tuple[Tensor, Sequence[Tensor], Any], return_error: bool, before: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and the errors if asked for, of heads that `attention` computes from projected rows; `before` those so far."""
        x, contexts, counted = given
        query = self.q_proj(x)
        keys = [projection(c) for projection, c in zip(self.k_projs, contexts, strict=True)]
        values = [projection(c) for projection, c in zip(self.v_projs, contexts, strict=True)]
        score_factor = None if self.bound_logit is None else torch.sigmoid(self.bound_logit)
        rows = query, keys, values, counted
        learned = Learned(score_factor, self.frequencies, before, self.decay_logit)
        out, error = attend(self.config, attention, rows, learned, torch.Tensor.detach, return_error)
        return self.out_proj(out), error

    def _attention(
        self,
        query: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        counted: Counted,
        return_error: bool,
        offsets: Any = None,
    ) -> Any:
        """All heads, each a leading dimension."""
        plans, texts = self._plans[_computed_in(query.dtype)]
        if not texts:
            return tensor_attention(
                query, keys, values, tol=self.config.tol, method=self.config.method,
                causal=self.config.causal, window=self.config.window, return_error=return_error,
                channels=self.config.channels, offsets=offsets, **counted.options(),
            )  # fmt: skip
        if not plans:
            raise PlanError(texts[0][0])
        chosen = plan_of_call(plans, [query.shape[-2], *(k.shape[-2] for k in keys)])
        plan, text = plans[chosen], texts[chosen][return_error]
        plain = counted.weights is None and counted.decays is None
        if offsets is None and traced_whole(plan) and 0 not in query.shape and plain:
            out, error = planned_attention(query, keys, values, plan=plan, text=text, key_masks=counted.masks)
            return (out, error) if return_error else out
        return tensor_attention(
            query, keys, values, plan=plan, causal=self.config.causal, window=self.config.window, offsets=offsets,
            return_error=return_error, **counted.options(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes, bound, degree, rank, error, and what a row costs."""
        config, plan = self.config, self.plan
        parts = [f"embed_dim={config.embed_dim}, num_heads={config.num_heads}, order={config.order}"]
        parts.append(f"head_dim={config.head_dim}, value_dim={config.value_dim}, num_key_heads={config.num_key_heads}")
        bound = "None" if config.bound is None else f"{config.bound:g}"
        parts.append(f"bound={bound}{' (learned)' if config.learn_bound else ''}, method={config.method!r}")
        if config.causal:
            parts.append("causal=True" if config.window is None else f"window={config.window}")
        if config.positions:
            parts.append(
                f"positions={config.positions!r}, base={config.base:g}{' (learned)' if config.learn_frequencies else ''}"
            )
        if config.decay is not None:
            parts.append(f"decay={config.decay!r}{' (learned)' if config.learn_decay else ''}")
        if plan is None:
            parts.append("planned from data in every call")
        elif plan.series == "banded":
            parts.append(f"degree={plan.degree}, rank={plan.rank}, error with the answer")
        elif plan.method == "polynomial":
            parts.append(f"degree={plan.degree}, rank={plan.rank}, error={plan.error:.2g}")
            parts.append(f"cost of a row=ordinary attention to {config.ordinary_rows(plan)} rows")
        return ", ".join(parts)


def _checked_place(device: Any, dtype: Any) -> None:
    """TypeError or ValueError unless tensors can be made of this dtype on this device."""
    checked_kind("dtype", dtype, torch.dtype, "a torch.dtype")
    checked_dtype(BACKEND.dtype_name(dtype))
    if device is None or isinstance(device, torch.device):
        return
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"device should be a torch.device, or what makes one, got {type(device).__name__}")
    try:
        torch.device(device)
    except (RuntimeError, ValueError):
        raise ValueError(f"device should be a torch.device, or what makes one, got {device!r}") from None


def _computed_in(dtype: torch.dtype) -> str:
    return "float64" if dtype == torch.float64 else "float32"


def _tensor_dtype(dtype: torch.dtype) -> torch.dtype:
    """What attention computes in, for weights of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_one(mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Weights (..., n), 0 where masked; the mask where there are none."""
    return weights if mask is None else mask if weights is None else torch.where(mask, weights, 0.0)


def _weight(projection: nn.Module) -> Tensor:
    """A tensor with the device and dtype of a projection's weights, whatever module stands in its place."""
    weight = getattr(projection, "weight", None)
    if callable(weight) and not isinstance(weight, Tensor):
        # Quantized modules give it when asked.
        weight = weight()
    if isinstance(weight, Tensor):
        return weight
    found = next(projection.parameters(), None)
    if found is None:
        raise TypeError(f"q_proj should be a module with weights, got {type(projection).__name__}")
    return found


def _served(weight: Tensor) -> tuple[str, ...]:
    """Dtypes that torch multiplies with these weights."""
    own, device = BACKEND.dtype_name(weight.dtype), weight.device.type
    # What holds quantized weights multiplies in its own way.
    if own not in FLOATS:
        return FLOATS
    cast = own != "float64" and device != "meta" and torch.is_autocast_enabled(device)
    return FLOATS[:-1] if cast else (own,)


def _plans(config: AttentionConfig, dtype: str, needed: bool) -> tuple[tuple[Plan, ...], tuple[tuple[str, ...], ...]]:
    """Plans to choose from and their texts, without and with errors of rows; no plan but a text that says why if there is none
    and it is not needed yet.
    """
    try:
        plans = plans_of(config, dtype)
    except PlanError as cannot:
        if needed:
            raise
        return (), ((str(cannot),),)
    return plans, tuple((written(plan, False), written(plan, True)) for plan in plans)
