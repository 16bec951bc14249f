"""Dask: its arrays are collections of blocks, and are refused where one array is wanted."""

from __future__ import annotations

from .base import Array, Backend


class DaskBackend(Backend):
    name = "Dask"

    def devices(self) -> list[str]:
        # It raises here what it would raise for whoever makes an array.
        import dask.array  # noqa: F401

        return ["wherever the blocks of an array are, by tattn.distributed.dask"]

    def why_refused(self, array: Array) -> str | None:
        # Operation by operation, a call would become tens of thousands of tasks.
        return "a Dask array: tattn.distributed.dask has the functions for these"


BACKEND = DaskBackend()
