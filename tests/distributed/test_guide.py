"""The code of the guide to several machines can be pasted; here into one process."""

from __future__ import annotations

import socket

import pytest
from snippets import paste


@pytest.mark.libraries("torch")
def test_code_for_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torchrun would say to a group of one.
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    try:
        assert paste("docs/beyond.md", "torch")["out"].shape == (1000, 8)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.libraries("dask")
def test_code_for_dask() -> None:
    assert paste("docs/beyond.md", "dask")["out"].shape == (10_000, 4)
