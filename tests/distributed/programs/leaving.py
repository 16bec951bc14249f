"""How programs leave a group."""

from __future__ import annotations

import gc

import torch.distributed as dist


def leave() -> None:
    """End the group and its threads on all ranks, before interpreters end: a thread that outlives one may abort the process."""
    # Layers, graphs and tracebacks hold on to the group.
    gc.collect()
    # No rank leaves while another is still at work.
    dist.barrier()
    dist.destroy_process_group()
