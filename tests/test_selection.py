"""Which tests a run takes: what waits for --thorough is left out by default, and --rest is the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.grid("numpy")
@pytest.mark.parametrize("case", range(12))
def test_grid(case):
    pass

@pytest.mark.grid
@pytest.mark.parametrize("case", range(12))
def test_grid_of_jax(case):
    pass

@pytest.mark.thorough
def test_long():
    pass

@pytest.mark.thorough("jax")
def test_long_for_jax():
    pass

@pytest.mark.thorough("numpy")
@pytest.mark.thorough("jax")
def test_long_for_two():
    pass

@pytest.mark.libraries("numpy")
def test_once(library):
    assert library.name == "numpy"

@pytest.mark.libraries("torch")
def test_of_torch():
    pass

@pytest.mark.gpu
def test_of_a_device():
    pass
"""
DRAWS = "def test_draws(draws): print('drawn', *draws(7))"


@pytest.fixture
def taken(pytester: pytest.Pytester):
    """Function of options: names of the tests that a run takes."""
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8"))

    def run(*options: str, tests: str = TESTS) -> list[str]:
        pytester.makepyfile(tests)
        done = pytester.runpytest_inprocess("-q", "-s", "-p", "no:cacheprovider", *options)
        return [line for line in done.outlines if "::" in line or line.startswith("drawn")]

    return run


def test_the_rest_is_what_a_run_leaves_out(taken):
    some, rest, every = (
        taken("--collect-only", "--library=numpy", *option) for option in ([], ["--rest"], ["--thorough"])
    )
    assert sorted(some + rest) == sorted(every)
    assert len(every) == 12 + 12 + 4
    left_out = {name.partition("::")[2] for name in rest}
    assert left_out == {
        "test_long",
        "test_long_for_two",
        *(f"test_grid[{case}]" for case in range(12) if case not in (0, 9)),
    }


def test_draws_are_shared_out(taken):
    some, rest, every = (taken(*option, tests=DRAWS)[0].split()[1:] for option in ([], ["--rest"], ["--thorough"]))
    assert some == ["0"]
    assert some + rest == every == [*map(str, range(7))]
