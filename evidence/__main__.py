"""`python -m evidence measure …`, `… demo …` and `… bands …`, from the root of a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tattn.terminal import command


@command("python -m evidence")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence", description="What tensor attention does on real heads, and what the paper claims."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="attention heads of a trained encoder on a real text")
    demo.add_argument("--tokens", type=int, default=8192, help="rows of every head (default: %(default)s)")
    demo.add_argument("--text", choices=("reference", "library"), default="reference", help="default: %(default)s")
    demo.add_argument(
        "--plot", default="tattn-demo.png", metavar="FILE", help="where to save the plot (default: %(default)s)"
    )
    demo.add_argument("--full", action="store_true", help="more degrees and all gradients: many times as long")
    demo.add_argument("--json", action="store_true", help="for programs, and no progress bar")

    bands = commands.add_parser("bands", help="the bound that comes with the answer, on every head of the encoder")
    bands.add_argument("--tokens", type=int, default=2048, help="rows of every head (default: %(default)s)")
    bands.add_argument("--out", default="docs/bands", metavar="FOLDER", help="where to write (default: %(default)s)")
    bands.add_argument("--quiet", action="store_true", help="no progress bar")

    measure = commands.add_parser("measure", help="tables, plots and a page on what the paper claims")
    measure.add_argument(
        "--out", metavar="FOLDER", help="where to write (default: docs/evidence, or build/evidence with --quick)"
    )
    measure.add_argument("--quick", action="store_true", help="small sizes, under a minute: to see that it runs")
    measure.add_argument(
        "--only", metavar="PART", nargs="+", default=(), help="growth, quality, stability, border, heads, learning"
    )

    given = vars(parser.parse_args(arguments))
    task = given.pop("command")
    # Each imports its own.
    if task == "measure":
        from . import run

        run(**given)
    elif task == "demo":
        from .demo import run as run_demo

        run_demo(as_json=given.pop("json"), **given)
    else:
        from .demo.bands import run as run_bands

        run_bands(**given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
