"""Attention over pairs in a model of Hugging Face transformers: the same with a cache, with padding and with checkpoints."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
example = pytest.importorskip("examples.hugging_face")

pytestmark = pytest.mark.libraries("torch")


def _model(seed: int = 0, **sizes):
    torch.manual_seed(seed)
    return example.model(rows=64, n_embd=32, n_head=4, **sizes).eval()


def _bytes(count: int, rows: int):
    return torch.randint(1, 256, (count, rows), generator=torch.Generator().manual_seed(1))


def test_heads_attend_to_pairs_of_neighbouring_key_heads():
    """By the definition: query head h reads key heads 2p and 2p + 1, p = h // (2 H / K), up to its own row."""
    rng = torch.Generator().manual_seed(2)
    draw = lambda heads, rows, d: torch.randn(2, heads, rows, d, generator=rng, dtype=torch.float64)  # noqa: E731
    query, key, value = draw(4, 5, 8), draw(4, 9, 8), draw(4, 9, 3)
    out, weights = example.pairs(torch.nn.Identity(), query, key, value, None)
    assert weights is None
    for h in range(4):
        p = h // 2
        q, a, b = (example.unit(x) for x in (query[:, h], key[:, 2 * p], key[:, 2 * p + 1]))
        x = example.BOUND * torch.einsum("tic,tjc,tkc->tijk", q, a, b)
        sees = torch.ones(5, 9, dtype=torch.bool).tril(diagonal=4)
        x = x.masked_fill(~(sees[:, :, None] & sees[:, None, :]), -torch.inf)
        f = torch.softmax(x.flatten(2), -1).unflatten(-1, (9, 9))
        wanted = torch.einsum("tijk,tje,tke->tie", f, value[:, 2 * p], value[:, 2 * p + 1])
        largest = value[:, 2 * p].abs().amax(1) * value[:, 2 * p + 1].abs().amax(1)
        plan = example.plan_of(8, 3, "float64")
        assert ((out[:, :, h] - wanted).abs() <= plan.error * largest[:, None]).all()


def test_writing_with_a_cache_is_writing_without():
    net, start = _model(), _bytes(2, 7)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    kept, anew = (net.generate(start, use_cache=cache, **options) for cache in (True, False))
    assert kept.shape == (2, 19)
    assert torch.equal(kept, anew)


def test_what_pads_on_the_left_changes_nothing():
    net, rows = _model(), _bytes(1, 9)
    places = torch.arange(9)[None]
    alone = net(input_ids=rows, position_ids=places).logits
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), rows], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)], 1)
    at = torch.cat([torch.zeros(1, 4, dtype=torch.long), places], 1)
    beside = net(input_ids=padded, attention_mask=mask, position_ids=at).logits[:, 4:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)
    unmasked = net(input_ids=padded, position_ids=at).logits[:, 4:]
    assert (unmasked - alone).abs().max() > 1e-3


def test_no_later_row_is_seen():
    net, rows = _model(), _bytes(1, 12)
    other = rows.clone()
    other[:, 8:] = 1
    torch.testing.assert_close(net(input_ids=other).logits[:, :8], net(input_ids=rows).logits[:, :8])


def test_checkpoints_of_activations_change_no_gradient():
    rows, found = _bytes(2, 10), []
    for checkpoints in (False, True):
        net = _model().train()
        for dropout in [m for m in net.modules() if isinstance(m, torch.nn.Dropout)]:
            dropout.p = 0.0
        if checkpoints:
            net.activation_checkpointing_enable()
        net(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        found.append([p.grad for p in net.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_key_heads_that_make_no_pairs_are_refused():
    rows = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match="num_key_value_heads should be even"):
        example.pairs(torch.nn.Identity(), rows, rows, rows, None)


def test_dropout_of_weights_is_refused():
    query = torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match="attn_pdrop should be 0"):
        example.pairs(torch.nn.Identity().train(), query, query, query, None, dropout=0.1)
