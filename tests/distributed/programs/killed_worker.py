"""A cluster of two processes, one of which is killed in the middle of output and gradients of a call."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster

import tattn
from tattn.distributed.dask import tensor_attention_vjp

BLOCKS, ROWS = 12, 300


def slowly(block: np.ndarray) -> np.ndarray:
    """Rows that take a while to come."""
    time.sleep(0.25)
    return block


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(-1, 1, (BLOCKS * ROWS, 3)) for _ in range(6)]
    plan = tattn.plan_for(n=BLOCKS * ROWS, dim=3, bound=1.0, degree=4, dtype="float64")
    expected_out, expected = tattn.tensor_attention_vjp(arrays[0], arrays[1:3], arrays[3:5], plan=plan)
    d_query, d_keys, d_values = expected(arrays[5])

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):

        def lazily(a: np.ndarray) -> Any:
            return da.from_array(a, chunks=(ROWS, 3)).map_blocks(slowly, dtype=a.dtype)

        q, a, b, u, v, g = map(lazily, arrays)
        out, pullback = tensor_attention_vjp(q, [a, b], [u, v], plan=plan)
        dquery, dkeys, dvalues = pullback(g)
        before = client.run(os.getpid)
        futures = client.compute([out, dquery, *dkeys, *dvalues])

        def finished() -> int:
            """Tasks that the scheduler has results of."""
            return client.run_on_scheduler(
                lambda dask_scheduler: sum(t.state == "memory" for t in dask_scheduler.tasks.values())
            )

        deadline = time.monotonic() + 60
        while finished() < 8:
            assert time.monotonic() < deadline, "nothing gets done"
            time.sleep(0.05)
        assert not any(f.done() for f in futures)
        address, pid = sorted(before.items())[0]
        os.kill(pid, signal.SIGKILL)
        print(
            f"killed a worker after {finished()} tasks, {sum(f.done() for f in futures)} of {len(futures)} results",
            flush=True,
        )
        results = client.gather(futures)
        after = client.run(os.getpid)
        assert pid not in after.values(), (address, before, after)
    for got, wanted in zip(results, (expected_out, d_query, *d_keys, *d_values), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-13)
    print("the answer is right", flush=True)


if __name__ == "__main__":
    dask.config.set({"distributed.comm.timeouts.connect": "30s"})
    main()
