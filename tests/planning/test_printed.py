"""What plans print, and what is said where a library is missing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import tattn
from tattn.plans import at_most


def test_printed_bounds_are_none_too_small():
    sizes = 10.0 ** np.random.default_rng(0).uniform(-300, 300, 2000)
    for bound in (*sizes.tolist(), 0.0, 1e-3, 9.999e-5, 0.1230000001):
        text = at_most(bound)
        assert bound <= float(text) <= 1.0101 * bound
        assert len(text.partition("e")[0]) == 4


def test_plans_print_their_errors_rounded_up():
    for bound in (0.5, 1.0, 2.0):
        plan = tattn.plan_for(n=1000, dim=4, bound=bound)
        printed = dict(line.split("  ", 1) for line in str(plan).splitlines())
        for name, error in (("error", plan.error), ("gradient error", plan.grad_error)):
            assert float(printed[name].split(",")[0]) >= error


def test_what_is_not_known_is_not_printed():
    plan = tattn.plan_for(n=1000, dim=8, bound=30.0)
    assert plan.method == "exact"
    assert "unknown" not in str(plan)


def test_a_plan_without_a_bound_says_what_to_do():
    with pytest.raises(TypeError, match=r"^bound should be a number, got NoneType: .*series='banded'.*tattn\.plan "):
        tattn.plan_for(n=1000, dim=8)


@pytest.mark.parametrize("name", ["nn.TensorAttention", "distributed.tensor_attention", "distributed.plan"])
def test_a_missing_library_is_named_with_the_way_to_install_it(name):
    program = f"import sys; sys.modules['torch'] = None; import tattn; tattn.{name}"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    message = f"ModuleNotFoundError: tattn.{name} needs torch, which is not installed: pip install 'tattn[torch]'"
    assert found.stderr.strip().splitlines()[-1] == message
