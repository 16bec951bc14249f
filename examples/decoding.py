"""Decoding: a token in, an output out, in time and memory that do not grow; a batch of streams that end at different times.

python examples/decoding.py [--tokens 2000]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import tattn

DIM, VALUE_DIM, STREAMS = 4, 8, 3


def main(arguments: list[str] | None = None) -> float:
    """Decode, and compare the last output of each stream with a call that sees the whole prefix: the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    tokens = parser.parse_args(arguments).tokens
    rng = np.random.default_rng(0)
    query, *keys = rng.uniform(-1, 1, (3, STREAMS, tokens, DIM))
    values = list(rng.uniform(0, 1, (2, STREAMS, tokens, VALUE_DIM)))
    ends = np.array([tokens, tokens // 2, tokens // 3])
    plan = tattn.plan_for(n=tokens, dim=DIM, bound=1.0, dtype="float64")

    state = tattn.DecodingState(plan)
    last = np.zeros((STREAMS, VALUE_DIM))
    seconds = []
    for i in range(tokens):
        row = slice(i, i + 1)
        # Streams that have ended are masked: their summaries stay as they are.
        going = (i < ends)[:, None]
        start = time.perf_counter()
        out, state = state.step(
            query[:, row], [k[:, row] for k in keys], [v[:, row] for v in values], key_masks=[going, going]
        )
        seconds.append(time.perf_counter() - start)
        last = np.where(going, out[:, 0], last)

    difference = 0.0
    for stream, end in enumerate(ends):
        whole = tattn.tensor_attention(
            query[stream, end - 1 : end], [k[stream, :end] for k in keys], [v[stream, :end] for v in values], plan=plan
        )
        difference = max(difference, float(np.abs(last[stream] - whole[0]).max()))
    tenth = max(1, tokens // 10)
    early, late = (float(np.median(part)) for part in (seconds[:tenth], seconds[-tenth:]))
    print(
        f"{STREAMS} streams of {', '.join(map(str, ends))} tokens; "
        f"{early * 1e3:.2f} ms a token at first, {late * 1e3:.2f} ms at last"
    )
    print(
        f"{sum(s.nbytes + r.nbytes for s, r in zip(state.summary.sums, state.summary.rests, strict=True)):,} bytes of state"
    )
    print(f"the last outputs differ from those of whole prefixes by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
