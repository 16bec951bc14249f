"""Attention to arrays on disk by a cluster of processes, which Dask runs; needs ``pip install "tattn[dask]" zarr``.

    python examples/dask_attention.py [--rows 200000] [--workers 2]

Rows come from Zarr in blocks and the output goes to Zarr in blocks; no process holds an array as a whole. The same lines run on a
cluster of machines: pass the address of its scheduler to Client.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster

import tattn
from tattn.distributed.dask import tensor_attention_vjp

DIM, BLOCK = 4, 20_000


def main() -> None:
    """Write, attend, differentiate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    plan = tattn.plan_for(n=given.rows, dim=DIM, bound=1.0, workers=given.workers)
    print(plan)
    cluster = LocalCluster(n_workers=given.workers, threads_per_worker=1, dashboard_address=None)
    with tempfile.TemporaryDirectory() as folder, cluster, Client(cluster):
        paths = {name: str(Path(folder) / f"{name}.zarr") for name in ("query", "a", "b", "u", "v", "out")}
        random = da.random.default_rng(0)
        for name in ("query", "a", "b", "u", "v"):
            rows = random.uniform(0 if name in "uv" else -1, 1, (given.rows, DIM), chunks=(BLOCK, DIM)).astype(
                np.float32
            )
            da.to_zarr(rows, paths[name])

        query, a, b, u, v = (da.from_zarr(paths[name]) for name in ("query", "a", "b", "u", "v"))
        out, pullback = tensor_attention_vjp(query, [a, b], [u, v], plan=plan)
        da.to_zarr(out, paths["out"])
        # The gradient of ½ |out|²; what is asked for together is computed together.
        dquery, _, dvalues = pullback(out)
        norm, some = dask.compute((dquery**2).sum() ** 0.5, dvalues[0][:5])
        print(f"{len(query.chunks[0])} blocks, |dquery| = {norm:.3e}")

        arrays = [np.asarray(x) for x in dask.compute(query, a, b, u, v)]
        expected, exactly = tattn.tensor_attention_vjp(arrays[0], arrays[1:3], arrays[3:], plan=plan)
        np.testing.assert_allclose(np.asarray(da.from_zarr(paths["out"])), expected, rtol=1e-4)
        np.testing.assert_allclose(some, exactly(expected)[2][0][:5], rtol=1e-3)
        print("the same as in one process")


if __name__ == "__main__":
    main()
