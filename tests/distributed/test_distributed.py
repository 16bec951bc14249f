"""Rows spread over processes that torchrun starts: programs that raise on any rank where something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watching import calls_of

import tattn

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.libraries("torch")
sharded = tattn.distributed.tensor_attention
PROGRAMS = Path(__file__).parent / "programs"


def launch(script: str, processes: int, *options: str, **environment: str) -> str:
    """What the processes print; their errors if one fails."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    path = os.pathsep.join([str(PROGRAMS.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(PROGRAMS / script), *options], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [*(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 2, 4)), 3])
def test_shards_are_the_whole(processes: int) -> None:
    """Output, lse, all gradients and second derivatives, plans from data, bytes that travel, compiled and not."""
    printed = launch("equality.py", processes)
    for rank in range(processes):
        assert f"rank {rank} of {processes} has seen 16 cases agree" in printed


@pytest.mark.gpu
def test_shards_are_the_whole_on_devices() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    devices = torch.cuda.device_count()
    assert f"rank 0 of {devices} has seen 16 cases agree" in launch("equality.py", devices, TESTED_DEVICE="cuda")


def test_what_ranks_disagree_on_is_an_error_on_all() -> None:
    assert launch("refusals.py", 3).count("has seen all refusals") == 3


def test_an_absent_rank_is_an_error_within_the_time_out() -> None:
    printed = launch("absent.py", 4)
    assert [f"rank {rank} was told of all absences" in printed for rank in range(4)] == [True, True, False, False]


def test_data_parallel_wrappers_and_compilers_around_it() -> None:
    printed = launch("around.py", 2)
    for wrapper in ("DDP", "compiled DDP", "FSDP", "causal DDP", "compiled causal DDP", "causal FSDP"):
        assert printed.count(f"through {wrapper} are those of one process") == 2


def refuse(error: type, match: str, **options: Any) -> None:
    q = torch.zeros(4, 3)
    with pytest.raises(error, match=match):
        sharded(q, [q, q], [q, q], **options)


def test_without_a_group() -> None:
    refuse(
        ValueError, r"^group should be a group of torch.distributed, and none is there: call torch.distributed.init_"
    )


def test_alone_in_a_group(tmp_path: Path) -> None:
    """In this process: what is not a torch tensor, and a traced call without a promise."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        plan = tattn.plan_for(n=4, dim=3, bound=1.0, degree=3)
        with pytest.raises(TypeError, match=r"^query should be a torch tensor, got ndarray"):
            q = torch.zeros(4, 3).numpy()
            sharded(q, [q, q], [q, q], plan=plan)
        compiled = torch.compile(
            lambda q, **options: sharded(q, [q, q], [q, q], **options), backend="aot_eager", fullgraph=True
        )
        with pytest.raises(Exception, match="the call is traced and its values cannot be read"):
            compiled(torch.zeros(4, 3))
        with pytest.raises(
            Exception, match=r"^[\s\S]*decay of rows that are spread should be None under torch\.compile"
        ):
            compiled(torch.zeros(4, 3), plan=plan, decay=[0.5, 0.5])
        query = torch.rand(4, 3)
        for other in (plan, tattn.plan_for(n=4, dim=3, bound=1.0, degree=1), plan):
            torch.testing.assert_close(
                compiled(query, plan=other), sharded(query, [query] * 2, [query] * 2, plan=other)
            )
    finally:
        torch.distributed.destroy_process_group()


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, tattn.distributed; print('torch' in sys.modules, 'dask' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        tattn.distributed.nothing  # noqa: B018


@pytest.mark.parametrize("options", [(), pytest.param(("--causal",), marks=pytest.mark.thorough)])
def test_the_example(options: tuple[str, ...]) -> None:
    examples = Path(__file__).parents[2] / "examples"
    assert "the same" in launch(str(examples / "sequence_parallel.py"), 2, *options)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_compiled_gradients_of_narrow_dtypes_are_those_of_eager_calls(alone: Any) -> None:
    """The adjoint gets the output in the dtype of the computation: values far from 0 lose all digits else."""
    from tattn.distributed.operator import compiled_attention
    from tattn.distributed.promise import Asked

    generator = torch.Generator().manual_seed(0)
    rows = [(2 * torch.rand(60, 4, generator=generator) - 1).bfloat16() for _ in range(3)]
    rows += [(torch.rand(60, 3, generator=generator) + 5).bfloat16() for _ in range(2)]
    g = torch.rand(60, 3, generator=generator).bfloat16()
    plan = tattn.plan_for(n=60, dim=4, bound=1.0, degree=4, dtype="bfloat16")
    asked = Asked(None, 1e-3, plan)

    def gradients(function: Any) -> Any:
        leaves = [x.clone().requires_grad_() for x in rows]
        out = function(leaves)
        assert out.dtype == torch.bfloat16
        return torch.autograd.grad(out, leaves, g)

    eager = gradients(lambda x: sharded(x[0], x[1:3], x[3:], plan=plan))
    compiled = gradients(lambda x: compiled_attention((x[0], x[1:3], x[3:], None, None), asked, None, True)[0])
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.01 * float(other.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_ranges_travel_in_arrays_of_one_size(alone: Any) -> None:
    """Ranks that agree add up as many numbers, whether they have masks or not; what would not add up is a fact."""
    from tattn.distributed import agreement, shards
    from tattn.distributed.promise import Asked

    def told(query: Any, values: Any, masks: Any) -> tuple[Any, list[tuple[str, int]]]:
        with calls_of(agreement.agree, agreement.all_reduce) as calls:
            shards.agreed((query, [rows, rows], [values, values], masks), Asked(None, 1e-2), alone)
        sizes = [(call.given["kind"], call.given["tensor"].numel()) for call in calls if call.name == "all_reduce"]
        (said,) = [call.given["said"] for call in calls if call.name == "agree"]
        return said, sizes

    rows = torch.rand(3, 5, 2)
    first = told(rows, rows, None)
    assert told(rows, rows, [torch.ones(5, dtype=torch.bool), None]) == first
    assert told(rows[0], rows, None)[0] != first[0]
    assert told(rows, rows[0], None)[0] != first[0]
