"""Attention over pairs in a model of Hugging Face transformers: `python -m examples.hugging_face` trains one and lets it write.

`register()` adds "tattn" to what `attn_implementation` may be. A model of transformers has one key and one value for each of its
key heads, and attention over pairs needs two. So two neighbouring key heads are the two views of one pair: of K key heads and H
query heads, query head h reads the heads 2p and 2p + 1 of keys and values, p = h // (2 H / K). No projection is left out, and the
model has the parameters that it had.

Rows of queries and keys are divided by their ℓ3-norms, so that no score is larger than BOUND, and the model's own scale is not
used. Positions should be added to the rows, as GPT-2 does. Rotary models turn queries and keys for a product of two rows; the
product of three does not depend on relative positions then. For these there is `tattn.nn.TensorAttention(positions="rotary")`.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel

import tattn

from .language_model import reference

NAME = "tattn"
BOUND, DEGREE, LONGEST = 2.0, 4, 4096


def pairs(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Query (b, H, n, d), key (b, K, m, d), value (b, K, m, dv), mask (b, m) of padding → (b, n, H, dv), and no weights.

    The n queries are the last of the m rows, as with a cache of keys.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    if key_heads % 2 or (2 * heads) % key_heads:
        raise ValueError(
            f"num_key_value_heads should be even and divide twice num_attention_heads, since two key heads are the views of a "
            f"pair, got {key_heads} and {heads}"
        )
    if dropout and module.training:
        raise ValueError(f"attn_pdrop should be 0, since weights of pairs are never formed, got {dropout:g}")
    if not getattr(module, "is_causal", True):
        raise ValueError("the attention should be causal, got is_causal=False")
    query = query.unflatten(1, (key_heads // 2, -1))
    keys, values = (tuple(x[:, i::2, None] for i in range(2)) for x in (key, value))
    plan = plan_of(query.shape[-1], value.shape[-1], "float64" if query.dtype == torch.float64 else "float32")
    mask = None if attention_mask is None else tattn.nn.from_attention_mask(attention_mask)[:, None, None]
    out: Tensor = tattn.tensor_attention(
        unit(query), [unit(k) for k in keys], list(values), plan=plan, scale=BOUND, causal=True, key_masks=mask
    )
    return out.flatten(1, 2).transpose(1, 2), None


@cache
def plan_of(dim: int, value_dim: int, dtype: str) -> tattn.Plan:
    """The plan of all layers and tokens with heads of these sizes."""
    return tattn.plan_for(
        n=LONGEST, dim=dim, value_dim=value_dim, bound=BOUND, scale=BOUND, degree=DEGREE, method="polynomial",
        causal=True, dtype=dtype,
    )  # fmt: skip


def unit(rows: Tensor) -> Tensor:
    """Rows (..., d) over their ℓ3-norms: by Hölder's inequality no product of three adds up to more than 1."""
    return torch.nn.functional.normalize(rows, p=3.0, dim=-1)


def padding(*_: Any, attention_mask: Tensor | None = None, kv_length: int, **__: Any) -> Tensor | None:
    """What is padding among the keys, (b, m), or None: the rest of a causal mask is known."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:]


def register() -> None:
    """From here on `attn_implementation="tattn"` is attention over pairs."""
    AttentionInterface.register(NAME, pairs)
    AttentionMaskInterface.register(NAME, padding)


def model(rows: int = LONGEST, **sizes: Any) -> GPT2LMHeadModel:
    """A small model of bytes from a config, with heads of 8 channels."""
    register()
    given: dict[str, Any] = {"n_embd": 64, "n_head": 8, "n_layer": 2, **sizes}
    config = GPT2Config(
        vocab_size=256,
        n_positions=rows,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        loss_type="ForCausalLM",
        **given,
    )
    config._attn_implementation = NAME
    return GPT2LMHeadModel(config)


def main() -> None:
    """Train with checkpoints of activations, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1024)
    given = parser.parse_args()
    torch.manual_seed(0)
    text, _unseen = reference()
    net = model()
    net.activation_checkpointing_enable()
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(given.steps):
        start = int(torch.randint(0, len(text) - given.rows, ()))
        piece = text[None, start : start + given.rows]
        loss = net(input_ids=piece, labels=piece, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == given.steps - 1:
            print(f"step {step}: {loss.item():.3f} nats a byte")
    net.eval()
    start = torch.tensor(list(b"The value of "))[None]
    written = net.generate(start, max_new_tokens=60, do_sample=True, top_k=10, pad_token_id=0)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
