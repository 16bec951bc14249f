"""`python -m tattn plan …` and `… info`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from . import __version__
from .backends.numpy import BACKEND
from .checks import SERIES
from .operands import CHANNELS, REAL
from .planning import plan_for
from .planning.limits import flops_of, speed
from .planning.selection import NAMES
from .plans import Plan, duration, strict_json
from .terminal import command


@command("python -m tattn")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tattn", description="Tensor attention, fast and with a bound on its error."
    )
    parser.add_argument("--version", action="version", version=f"tattn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    plan = commands.add_parser("plan", help="what a call would cost and how wrong it could be")
    plan.add_argument("--n", type=int, required=True, help="rows of query and of every view")
    plan.add_argument("--dim", type=int, required=True, help="channels of query and keys")
    plan.add_argument(
        "--bound",
        type=float,
        help="largest scale · Σ_c |q_c a_c b_c|, and so largest |score|; required, but for --series banded",
    )
    plan.add_argument("--tol", type=float, default=1e-3, help="largest error allowed (default: %(default)s)")
    plan.add_argument("--order", type=int, default=3, help="views and one for the query (default: %(default)s)")
    plan.add_argument("--dtype", default="float32", help="default: %(default)s")
    plan.add_argument("--value-dim", type=int, help="channels of the values (default: dim)")
    plan.add_argument("--scale", type=float, help="factor of the scores (default: 1/dim)")
    plan.add_argument("--degree", type=int, help="force the polynomial method at this degree")
    plan.add_argument("--method", choices=NAMES, default="auto")
    plan.add_argument("--series", choices=SERIES, default="minimax")
    plan.add_argument("--bands", type=int, help="norm bands of each view, with --series banded (default: 8)")
    plan.add_argument("--moment", type=int, help="moment that bounds their error, with --series banded (default: 2)")
    plan.add_argument("--causal", action="store_true", help="a row sees keys up to its own row")
    plan.add_argument("--window", type=int, nargs="+", help="and of those the last so many of each view")
    plan.add_argument("--channels", choices=CHANNELS, default=REAL, help="complex: dim real and imaginary parts")
    plan.add_argument("--workers", type=int, help="processes or machines with a share of the rows each")
    plan.add_argument("--bandwidth", type=float, help="bytes a second that a worker sends")
    plan.add_argument("--max-flops", type=float, help="refuse a call that takes more operations")
    plan.add_argument("--flops", type=float, help="operations a second that a worker reaches")
    plan.add_argument("--json", action="store_true", help="for programs")

    info = commands.add_parser("info", help="which array libraries are installed and work, and what they see")
    info.add_argument("--json", action="store_true", help="for programs")

    given = vars(parser.parse_args(arguments))
    command, as_json = given.pop("command"), given.pop("json", False)
    if command == "plan" and given["bound"] is None and given["series"] != "banded":
        plan.error("--bound is required, but for --series banded")
    try:
        if command == "plan":
            planned = plan_for(**given)
            print(strict_json(planned.facts()) if as_json else planned)
            if not as_json and planned.workers == 1:
                print(_here(planned))
        else:
            _info(as_json)
    except (ImportError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _here(plan: Plan) -> str:
    """How long the call would take with NumPy on this machine, in the manner of a plan's lines."""
    array = np.ones((1, 1), "float64" if plan.dtype == "float64" else "float32")
    seconds = flops_of(plan) / speed(BACKEND, array)
    return f"{'here, with NumPy':<17}  about {duration(seconds)}, three times as long with the gradient"


def _info(as_json: bool) -> None:
    """Print what `tattn` can run on here."""
    # Only who asks has all libraries imported.
    from .backends import kernels, seen

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = {"tattn": __version__, "python": platform.python_version(), "cores": cores}
    if as_json:
        print(
            strict_json(
                {**about, "libraries": [asdict(library) for library in seen.libraries()], "kernels": asdict(kernels())}
            )
        )
        return
    print(f"tattn {__version__}, Python {about['python']}, {cores} core{'s' * (cores != 1)}\n")
    for library in seen.libraries():
        print(library, flush=True)
    print(kernels())


if __name__ == "__main__":
    sys.exit(main())
