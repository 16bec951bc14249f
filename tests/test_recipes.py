"""The recipes of CONTRIBUTING.md, followed literally and held against the exact method; and the journey in docs/design.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from cases import write_other_library

import tattn
from tattn.backends.numpy import BACKEND
from tattn.methods import METHODS, Exact
from tattn.methods.gradient_bounds import OneError
from tattn.planning.program import written
from tattn.plans import plan_text
from tattn.stored import plan_of_facts

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(recipe: str, language: str = "python") -> list[str]:
    """The blocks of code under a heading, in their order."""
    section = re.search(rf"^## {recipe}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert section, recipe
    found = re.findall(rf"^```{language}\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)
    assert found, (recipe, language)
    return found


def followed(recipe: str) -> dict:
    """The names that the code of a recipe defines, its blocks run one after the other."""
    # Dataclasses look for the module of their class.
    names = {"__name__": __name__}
    for block in blocks(recipe):
        exec(compile(block, f"CONTRIBUTING.md, {recipe}", "exec", dont_inherit=True), names)
    return names


def drawn(n: int, dtype: str = "float32") -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Query, keys and values of two views, in four channels."""
    q, a, b, u, v = np.random.default_rng(n).uniform(-1, 1, (5, n, 4)).astype(dtype)
    return q, [a, b], [u, v]


def exact(query, keys, values):
    """Output and gradients by the exact method in float64; the query stands for the gradient of the output."""
    query, *rest = (x.astype("float64") for x in (query, *keys, *values))
    out, pullback = tattn.tensor_attention_vjp(query, rest[:2], rest[2:], method="exact")
    return out, pullback(query)


def flat(gradients) -> list[np.ndarray]:
    query, keys, values = gradients
    return [query, *keys, *values]


def assert_within(found, expected, error, values):
    """Every entry of the output within the error, relative to the product of the largest values of its channel."""
    sizes = np.prod([abs(v.astype("float64")).max(axis=0) for v in values], axis=0)
    assert found.shape == expected.shape
    assert (abs(found - expected) <= error * sizes).all()


def assert_gradients_within(found_and_bounds, expected):
    """Every entry of every gradient within its bound."""
    for gradient, bound, true in zip(*map(flat, found_and_bounds), flat(expected), strict=True):
        assert gradient.dtype == np.float32
        assert (abs(gradient - true) <= bound).all()


def test_a_method(tmp_path):
    """In a copy of the package, since a method is part of it."""
    package = tmp_path / "tattn"
    shutil.copytree(Path(tattn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    module, _ = blocks("Add a method")
    (tmp_path / re.match(r"# src/(\S+)\n", module)[1]).write_text(module, encoding="utf-8")
    table, (changes,) = package / "methods" / "__init__.py", blocks("Add a method", "diff")
    text = table.read_text(encoding="utf-8")
    for before, added in re.findall(r"^ (.*\n)\+(.*\n)", changes, re.MULTILINE):
        assert text.count(before) == 1
        text = text.replace(before, before + added)
    table.write_text(text, encoding="utf-8")
    paths = [str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {__name__} as recipes; recipes.check_wide({str(package)!r})"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def check_wide(package: str) -> None:
    """The method of the recipe, in this package."""
    from tattn.methods.wide import Wide

    assert Path(tattn.__file__).parent == Path(package)
    names: dict = {}
    exec(blocks("Add a method")[1], names)
    query, keys, values = drawn(60)
    (out, plan), pullback = names["wide"](query, keys, values)
    assert plan.algorithm == Wide()
    assert plan.method == "wide"
    usual = Exact().guarantee(plan.problem, plan.scores)
    assert plan.certified
    assert plan.error < usual.error / 10

    expected, gradients = exact(query, keys, values)
    assert out.dtype == np.float32
    assert_within(out, expected, plan.error, values)
    found = pullback(query, return_error=True)
    assert_gradients_within(found, gradients)
    # No worse than one rounding to float32: float64 was computed in.
    assert abs(out - expected).max() <= 2.0**-24 * abs(expected).max()

    assert tattn.plan(query, keys, values, method="wide") == tattn.plan(query, keys, values, method=Wide()) == plan
    assert (tattn.tensor_attention(query, keys, values, plan=plan) == out).all()
    assert plan_of_facts(json.loads(plan_text(plan))) == plan
    assert written(plan, False)
    assert "wide was asked for" in str(plan)
    METHODS["scaled"] = Scaled
    scaled = tattn.plan(query, keys, values, method=Scaled(3.0))
    assert plan_of_facts(json.loads(plan_text(scaled))) == scaled
    promised = tattn.plan_for(n=60, dim=4, bound=plan.bound, method="wide")
    assert promised.error == plan.error
    with pytest.raises(ValueError, match=r"^degree belongs to the polynomial method, got it with method 'wide'"):
        tattn.plan(query, keys, values, method="wide", degree=2)
    with pytest.raises(
        ValueError, match=r"^method should be one of 'auto', 'polynomial', 'exact', 'wide', got 'wider'"
    ):
        tattn.tensor_attention(query, keys, values, method="wider")
    with pytest.raises(tattn.PlanError, match=r"^plan has method 'wide', the call asks for method 'exact'"):
        tattn.tensor_attention(query, keys, values, plan=plan, method="exact")


@dataclass(frozen=True)
class Scaled(OneError):
    """The exact method with other scales, which has a field and is in no table."""

    factor: float = 2.0

    name: ClassVar[str] = "scaled"
    extra: ClassVar[int] = 0
    at_a_time = Exact.at_a_time
    cost = Exact.cost

    def _scaled(self, operands):
        return operands._replace(scale=self.factor * operands.scale)

    def forward(self, operands, certify=False):
        return Exact().forward(self._scaled(operands))

    def backward(self, operands, attended, upstream):
        return Exact().backward(self._scaled(operands), attended, upstream)

    def guarantee(self, problem, scores):
        if problem.order.causal:
            raise ValueError("method 'scaled' is not for causal calls")
        return Exact().guarantee(problem, scores._replace(bound=self.factor * scores.bound))


def test_a_method_as_a_value():
    """It needs no line in a table, and its fields are facts of the plan."""
    query, keys, values = drawn(60, "float64")
    plan = tattn.plan(query, keys, values, method=Scaled(3.0))
    assert plan.method == "scaled"
    assert plan.certified
    assert plan.flops_polynomial == plan.flops_exact
    out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan)
    expected, gradients = tattn.tensor_attention_vjp(query, keys, values, scale=0.75, method="exact")
    assert (out == expected).all()
    assert all((a == b).all() for a, b in zip(flat(pullback(query)), flat(gradients(query)), strict=True))
    assert plan.facts()["options"] == {"factor": 3.0}
    with pytest.raises(ValueError, match=r"^plan's method should be one that goes with the rest of it, got 'scaled'"):
        plan_of_facts(plan.facts())
    with pytest.raises(ValueError, match=r"is not for causal calls$"):
        tattn.plan(query, keys, values, method=Scaled(), causal=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (3, "^a plan's options should be by name, got 3"),
        ({"factor": {}}, "^a plan's options should be text, numbers or tuples of them, got {} for 'factor'"),
        ({"factor": 2.0}, "^a plan's options should be those of method 'exact'"),
    ],
)
def test_options_that_are_none_of_the_method(options, message):
    plan = tattn.plan_for(n=9, dim=3, bound=1.0, method="exact")
    with pytest.raises(ValueError, match=message):
        plan_of_facts(plan.facts() | {"options": options})


def test_a_polynomial_has_no_options():
    plan = tattn.plan_for(n=9, dim=3, bound=1.0, method="polynomial")
    with pytest.raises(ValueError, match=r"^a plan of method 'polynomial' has no options"):
        plan_of_facts(plan.facts() | {"options": {"factor": 2.0}})


def test_a_kernel():
    query, values, _ = drawn(2000)
    query = query[:20] / np.float32([8, 1, 1, 1])
    # Values that are high where scores are, and channels of unequal sizes: weights and units show.
    keys = [values[0] * np.float32([8, 1, 1, 1]), values[1]]
    before = tattn.plan(query, keys, values, method="polynomial", tol=1e-2)
    # Whatever the recipe leaves in the backend goes with the test.
    with BACKEND.using(kernels=BACKEND.kernels):
        follow_the_kernel(query, keys, values, before)


def follow_the_kernel(query, keys, values, before) -> None:
    names = followed("Add a kernel")
    kernel = names["kernel"]
    taken = []

    def counted(*given):
        taken.append(given[0].shape)
        return kernel.function(*given)

    BACKEND.kernels = (kernel._replace(function=counted), *BACKEND.kernels[1:])

    plan = tattn.plan(query, keys, values, degree=before.degree, bound=before.bound)
    promised = tattn.plan_for(n=2000, dim=4, bound=before.bound, degree=before.degree)
    assert plan.chain == kernel.chain > promised.chain
    # The rounding of the longer chains, and nothing else, is what the error grows by.
    longer = replace(promised.problem, chain=kernel.chain)
    assert plan.error == promised.algorithm.guarantee(longer, promised.scores).error > promised.error

    expected, gradients = exact(query, keys, values)
    out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan)
    assert taken == [keys[0].shape, keys[1].shape]
    assert_within(out, expected, plan.error, values)
    assert_gradients_within(pullback(query, return_error=True), gradients)
    del taken[:]

    # A plan that counts with shorter chains does without it.
    other = tattn.tensor_attention(query, keys, values, plan=promised)
    assert taken == []
    assert_within(other, expected, promised.error, values)
    # Both compute the same polynomial: between them is rounding alone.
    of_polynomial = plan.delta / sqrt(1 - plan.delta**2)
    assert_within(other, out, plan.error + promised.error - 2 * of_polynomial, values)
    assert abs(other - out).max() > 0


# Its other library is array-api-strict under another name.
@pytest.mark.libraries("strict")
def test_a_backend(tmp_path):
    write_other_library(tmp_path)
    package, checked = blocks("Add a backend")
    (declared,) = blocks("Add a backend", "toml")
    name = re.match(r"# (\w+\.py)\n", package)[1]
    (tmp_path / name).write_text(package, encoding="utf-8")
    points = tomllib.loads(declared)["project"]["entry-points"]["tattn.backends"]
    info = tmp_path / "recipe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: recipe\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{module} = {value}" for module, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[tattn.backends]", *lines, ""]), encoding="utf-8")
    code = f"""
import otherlib, tattn
from tattn.backends import backend_of
{checked}
rows = otherlib.asarray([[0.1, 0.2], [0.3, 0.4]])
print(backend_of(rows).name, type(tattn.tensor_attention(rows, [rows, rows], [rows, rows])).__module__)
"""
    paths = [str(tmp_path), str(Path(tattn.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Other", "otherlib._array_object"]


def test_the_journey_of_a_call():
    """The files that a call enters, in order, are those of docs/design.md."""
    text = (Path(__file__).parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    listed = re.search(r"## The journey of one call\n.*?```text\n(.*?)```", text, re.DOTALL)
    assert listed
    package = Path(tattn.__file__).parent
    query, *views = np.random.default_rng(0).uniform(-1, 1, (5, 900, 4))
    entered: dict[str, None] = {}

    def enter(frame, event, _):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(package)):
            entered[Path(file).relative_to(package).as_posix()] = None

    # The first call imports and fills tables.
    tattn.tensor_attention(query, views[:2], views[2:])
    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        tattn.tensor_attention(query, views[:2], views[2:])
    finally:
        sys.setprofile(before)
    assert list(entered) == [line.split()[0] for line in listed[1].splitlines()]
