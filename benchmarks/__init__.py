"""Time, memory and error beside the bare matrix products and beside every rival: `python -m benchmarks`, `nox -s bench`."""
