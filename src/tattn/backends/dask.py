"""Dask: its arrays are collections of blocks, and are refused where one array is wanted."""

from __future__ import annotations

from .base import Array, Backend


class DaskBackend(Backend):
    name = "Dask"

    def why_refused(self, array: Array) -> str | None:
        # Operation by operation, a call would become tens of thousands of tasks.
        return "a Dask array: tattn.distributed.dask has the functions for these"


BACKEND = DaskBackend()
