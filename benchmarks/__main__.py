"""All measurements, in one process for each library and number of threads, and the report of them.

    python -m benchmarks [--quick] [--device cuda] [--library NAME …] [--threads N …] [--out FOLDER] [-k EXPRESSION]

JSON goes to build/benchmarks, the report to docs/benchmarks.md; that of a quick run stays in build/benchmarks. All of
it takes the better part of an hour, and wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from . import report
from .conftest import COMMIT
from .libraries import NAMES

_ROOT = Path(__file__).parent.parent
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def main() -> int:
    """Measure and report; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, less repetition: not to be quoted")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--library", choices=NAMES, nargs="+", help="those that compute on the device if not given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=_ROOT / "build" / "benchmarks", help="folder for the JSON")
    parser.add_argument("-k", default="", help="only cases that match, as in pytest; no report is made")
    given = parser.parse_args()
    libraries = given.library or (["numpy", "torch", "jax"] if given.device == "cpu" else ["torch", "cupy", "jax"])
    # On a GPU the threads of the host hardly matter.
    threads = given.threads if given.device == "cpu" else [1]
    # Parts stay apart: a report is of one run of everything.
    part = "part" if given.k else "quick" if given.quick else "full"
    folder = given.out / (part if given.device == "cpu" else f"{part}-gpu")
    folder.mkdir(parents=True, exist_ok=True)
    # Once, whatever is edited meanwhile.
    os.environ[COMMIT] = _commit()
    failed = []
    for count in threads:
        for name in libraries:
            file = folder / f"{name}-{given.device}-{count}.json"
            file.unlink(missing_ok=True)
            options = ["--library", name, "--threads", str(count), "--device", given.device]
            options += [*(["--quick"] if given.quick else []), *(["-k", given.k] if given.k else [])]
            if _pytest(options, file, count) or not (given.k or _measured(file)):
                failed.append(f"{name} on {count} thread{'s' * (count > 1)}")
    if failed:
        print(
            f"cases failed, or nothing was measured: {', '.join(failed)}. No report is made; python -m benchmarks.report {folder} "
            "makes one of the rest",
            file=sys.stderr,
        )
    elif not given.k:
        report.main([str(folder)])
    return int(bool(failed))


def _measured(file: Path) -> bool:
    """Whether a process left something behind: one whose library or device is missing skips all."""
    return (
        file.exists() and file.stat().st_size > 0 and bool(json.loads(file.read_text(encoding="utf-8"))["benchmarks"])
    )


def _commit() -> str:
    """What is measured: the commit, and whether anything that matters differs from it."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "src", "benchmarks", "evidence"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}, changed" if changes else commit


def _pytest(options: list[str], file: Path, threads: int) -> int:
    """One process; what pytest returns, 0 if all cases passed."""
    print(f"\n{file.stem}", flush=True)
    # Why all was skipped, where a device is missing.
    shown = ["-rs"] if "cuda" in options else []
    # The options of the tests, in pyproject.toml, are none of ours: warnings of other packages are not errors here.
    settings = ["-c", os.devnull, "--rootdir", str(_ROOT), "-p", "no:cacheprovider", "-q", "--tb", "short", *shown]
    command = [sys.executable, "-m", "pytest", *settings, "--benchmark-quiet", f"--benchmark-json={file}"]
    environment = {**os.environ, **dict.fromkeys(_VARIABLES, str(threads))}
    return subprocess.run(
        [*command, str(_ROOT / "benchmarks"), *options], env=environment, cwd=_ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
