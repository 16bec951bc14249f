"""Statements of the paper that the tests of single functions leave, and the page that says where each one is shown."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from math import e, exp, lgamma, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.polynomial.legendre import leggauss
from test_products import Products
from test_training import Factors, draw, problem_of
from training_reference import NAMES, core, derivative, steps

import tattn
from tattn.approximation.exponential import smallest
from tattn.features.monomials import rank
from tattn.paper import TrainingProblem, exact_gradient, loss, loss_gradient

Matrices = dict[str, np.ndarray]

PAGE = Path(__file__).parents[2] / "docs" / "paper.md"


@pytest.fixture(scope="module")
def on(library: Any) -> Products:
    return Products(library)


def operands(m: Matrices) -> list[np.ndarray]:
    """A1 X1, A2 X2, A3 X3, A4 Y1, A5 Y2."""
    return [m[left] @ m[right] for left, right in zip(NAMES[:5], NAMES[6:], strict=True)]


def random_matrices(size: float = 1.0) -> Matrices:
    """A training problem with sizes that are all different but where they must agree."""
    return draw(3, lengths=(4, 3, 2), widths=(3, 2, 4, 3, 2), dim=2, value_dim=3, size=size)


# Section 2, as it is written: with the products, nothing streamed.


def test_definition_2_4_inputs_and_weights(library: Any, on: Products) -> None:
    """Q, K1, K2, V1, V2 are projections of one sequence; X and Y put the weights of a head together (Fact C.7)."""
    rng = np.random.default_rng(0)
    z, wq, wk1, wk2, wv1, wv2 = rng.normal(size=(7, 3)), *rng.normal(size=(5, 3, 3)) / 3
    left = (z @ wq) @ on.khatri_rao(z @ wk1, z @ wk2).T
    x, y = wq @ on.khatri_rao(wk1, wk2).T, on.khatri_rao(wv1, wv2)
    np.testing.assert_allclose(left, z @ x @ on.kronecker(z, z).T, atol=1e-12)
    np.testing.assert_allclose(on.khatri_rao(z @ wv1, z @ wv2), on.kronecker(z, z) @ y, atol=1e-12)
    problem = TrainingProblem(*library.arrays(z, z, z, z, z, np.zeros((7, 3)), wq, wk1, wk2, wv1, wv2))
    q, a, b, u, v = library.arrays(z @ wq, z @ wk1, z @ wk2, z @ wv1, z @ wv2)
    out = library.numpy(tattn.tensor_attention(q, [a, b], [u, v], method="exact"))
    np.testing.assert_allclose(library.numpy(loss(problem, method="exact")), 0.5 * (out**2).sum(), rtol=1e-12)


def test_definition_2_5_tensor_attention(library: Any, on: Products) -> None:
    """D⁻¹ A V with A = exp(Q (K1 ⊘ K2)ᵀ / d), D = diag(A 1) and V = V1 ⊘ V2; A has full rank, its logarithm rank d."""
    rng = np.random.default_rng(0)
    q, k1, k2 = rng.uniform(-3, 3, (3, 6, 2))
    v1, v2 = rng.normal(size=(2, 6, 4))
    scores = q @ on.khatri_rao(k1, k2).T / 2
    attention = np.exp(scores)
    expected = (attention / attention.sum(-1, keepdims=True)) @ on.khatri_rao(v1, v2)
    assert np.linalg.matrix_rank(scores) == 2
    assert np.linalg.matrix_rank(attention) == 6
    query, keys, values = library.arrays(q, [k1, k2], [v1, v2])
    got = library.numpy(tattn.tensor_attention(query, keys, values, method="exact"))
    np.testing.assert_allclose(got, expected, atol=1e-13)


@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-6])
def test_definition_2_7_approximate_attention(library: Any, eps: float) -> None:
    """Entries up to B, every entry of the output within ε: `tol` = ε/B², as `tol` is relative to max|V1| max|V2|."""
    rng, b = np.random.default_rng(0), 1.3
    arrays = rng.choice([-b, b, 0.3 * b], (5, 9, 2))
    query, *rest = library.arrays(*arrays)
    got = tattn.tensor_attention(query, rest[:2], rest[2:], tol=eps / b**2, method="polynomial")
    scores = np.einsum("ic,jc,kc->ijk", *arrays[:3]) / 2
    f = np.exp(scores) / np.exp(scores).sum((1, 2), keepdims=True)
    assert np.abs(library.numpy(got) - np.einsum("ijk,je,ke->ie", f, *arrays[3:])).max() <= eps


def test_definition_2_8_loss(library: Any, on: Products) -> None:
    """½ ‖D(X)⁻¹ exp(A1 X (A2 ⊗ A3)ᵀ / d) (A4 ⊗ A5) Y − E‖², X = X1 (X2 ⊘ X3)ᵀ and Y = Y1 ⊘ Y2."""
    m = random_matrices()
    x, y = m["x1"] @ on.khatri_rao(m["x2"], m["x3"]).T, on.khatri_rao(m["y1"], m["y2"])
    attention = np.exp(m["a1"] @ x @ on.kronecker(m["a2"], m["a3"]).T / 2)
    out = (attention / attention.sum(-1, keepdims=True)) @ on.kronecker(m["a4"], m["a5"]) @ y
    got = library.numpy(loss(problem_of(library, m), method="exact"))
    np.testing.assert_allclose(got, 0.5 * ((out - m["e"]) ** 2).sum(), rtol=1e-12)


# Appendices D and E: what the closed form is made of.


class Dense:
    """The functions of appendix D at x = vec(X)/d, by their definitions, for A = A1 ⊗ A2 ⊗ A3 made by the library."""

    def __init__(self, m: Matrices, on: Products) -> None:
        self.m, self.n = m, len(m["a1"])
        self.x = core(m).reshape(-1) / m["x1"].shape[-1]
        # Row j of (A_1; …; A_n): the pairs of rows of A2 and A3 with row j of A1.
        self.blocks = on.kronecker(m["a1"], m["a2"], m["a3"]).reshape(self.n, -1, self.x.size)
        self.h = on.kronecker(m["a4"], m["a5"]) @ on.khatri_rao(m["y1"], m["y2"])

    def scores(self, x: np.ndarray) -> np.ndarray:
        return self.blocks @ x

    def u(self, x: np.ndarray) -> np.ndarray:
        return np.exp(self.scores(x))

    def alpha(self, x: np.ndarray) -> np.ndarray:
        return self.u(x).sum(-1)

    def f(self, x: np.ndarray) -> np.ndarray:
        return self.u(x) / self.alpha(x)[:, None]

    def output(self, x: np.ndarray) -> np.ndarray:
        return self.f(x) @ self.h

    def c(self, x: np.ndarray) -> np.ndarray:
        return self.output(x) - self.m["e"]

    def losses(self, x: np.ndarray) -> np.ndarray:
        return 0.5 * self.c(x) ** 2

    def q(self, x: np.ndarray) -> np.ndarray:
        return self.c(x) @ self.h.T

    def p(self, x: np.ndarray) -> np.ndarray:
        f, q = self.f(x), self.q(x)
        return np.stack([(np.diag(f[j]) - np.outer(f[j], f[j])) @ q[j] for j in range(self.n)])


def test_definitions_d_1_to_d_8_are_what_the_library_computes(library: Any, on: Products) -> None:
    """u by the tensor trick, α as lse, f h as the output, c and L as the loss; q and p: the test below."""
    m = random_matrices()
    dense = Dense(m, on)
    scores = on.apply_kronecker([m["a1"], m["a2"], m["a3"]], dense.x)
    np.testing.assert_allclose(dense.u(dense.x).reshape(-1), np.exp(scores), rtol=1e-12)
    q, a, b, u, v = library.arrays(*operands(m))
    out, lse = tattn.tensor_attention(q, [a, b], [u, v], method="exact", return_lse=True)
    np.testing.assert_allclose(library.numpy(lse), np.log(dense.alpha(dense.x)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(library.numpy(out), dense.output(dense.x), atol=1e-13)
    np.testing.assert_allclose(steps(m).c, dense.c(dense.x), atol=1e-13)
    got = library.numpy(loss(problem_of(library, m), method="exact"))
    np.testing.assert_allclose(got, dense.losses(dense.x).sum(), rtol=1e-12)


def test_lemmas_e_2_to_e_6_dense_steps_are_the_streamed_gradient(library: Any, on: Products) -> None:
    """f and h, c, q, p one after the other, and A1ᵀ p (A2 ⊗ A3) / d; as a vector, (A1 ⊗ A2 ⊗ A3)ᵀ vec(p) / d."""
    m = random_matrices()
    dense = Dense(m, on)
    p = dense.p(dense.x)
    gradient = m["a1"].T @ p @ on.kronecker(m["a2"], m["a3"]) / 2
    as_vector = on.apply_kronecker([m["a1"].T, m["a2"].T, m["a3"].T], p.reshape(-1)) / 2
    np.testing.assert_allclose(as_vector, gradient.reshape(-1), atol=1e-13)
    got = library.numpy(exact_gradient(problem_of(library, m)))
    np.testing.assert_allclose(got, gradient, atol=1e-13)


def jacobian(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Derivative by every entry of x, last: (..., len(x))."""
    shape = np.shape(function(x))
    columns = [derivative(lambda x, i=i: function(x)[i], x) for i in np.ndindex(*shape)]
    return np.reshape(columns, (*shape, x.size))


def test_lemma_d_10_derivatives(library: Any, on: Products) -> None:
    """All eight parts against differences; part 8, added up and times the 1/d of remark D.9, is the library's gradient."""
    m = random_matrices()
    dense = Dense(m, on)
    x, blocks = dense.x, dense.blocks
    u, f, h, c = dense.u(x), dense.f(x), dense.h, dense.c(x)
    moved = blocks * f[..., None]  # A_{j,i} ∘ f_j
    mean = moved.sum(1)  # ⟨A_{j,i}, f_j⟩
    of_f = moved - mean[:, None, :] * f[..., None]
    of_output = np.einsum("jke,ki->jie", moved, h) - (f @ h)[..., None] * mean[:, None, :]
    parts = {
        "1": (lambda x: x, np.eye(x.size)),
        "2": (dense.scores, blocks),
        "3": (dense.u, blocks * u[..., None]),
        "4": (dense.alpha, (blocks * u[..., None]).sum(1)),
        "5": (dense.f, of_f),
        "6": (dense.output, of_output),
        "7": (dense.c, of_output),
        "8": (dense.losses, c[..., None] * of_output),
    }
    for part, (function, expected) in parts.items():
        np.testing.assert_allclose(jacobian(function, x), expected, rtol=1e-9, atol=1e-10, err_msg=f"part {part}")
    got = library.numpy(exact_gradient(problem_of(library, m)))
    np.testing.assert_allclose(got.reshape(-1), parts["8"][1].sum((0, 1)) / 2, atol=1e-13)


# Section 4 and appendix F: errors and operations.


def test_lemmas_f_1_to_f_7_errors(library: Any) -> None:
    """f, c, q, p1 = f ∘ q and p2 = diag(r) f, all off by a multiple of the polynomial's relative error δ."""
    made = Factors(library)
    exact, delta = steps(made.matrices), made.polynomial.delta
    scores = np.einsum("ic,jc,kc->ijk", *operands(made.matrices)[:3]) / 2
    assert np.abs(scores).max() <= made.polynomial.bound
    f = np.einsum("ir,jr,kr->ijk", *made.dense)
    u, v = made.values
    o = np.einsum("ijk,je,ke->ie", f, u, v)
    c = o - made.matrices["e"]
    q = np.einsum("ie,je,ke->ijk", c, u, v)
    r = (f * q).sum((1, 2))
    sizes = np.abs(u).max(0) * np.abs(v).max(0)
    eta, w, moved = delta / (1 - delta), np.abs(exact.c) @ sizes, (sizes**2).sum()
    assert (np.abs(f - exact.f) <= 2 * eta * exact.f).all()  # F.1
    assert (np.abs(c - exact.c) <= eta * sizes).all()  # F.2
    assert (np.abs(q - exact.w) <= eta * moved).all()  # F.3
    assert (np.abs(f * q - exact.f * exact.w).sum((1, 2)) <= eta * (w + moved)).all()  # F.5
    p2, exact_p2 = r[:, None, None] * f, exact.r[:, None, None] * exact.f
    assert (np.abs(p2 - exact_p2).sum((1, 2)) <= eta * (2 * w + moved + eta * (w + moved))).all()  # F.7
    assert np.abs(f - exact.f).max() > 0


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-8, 1e-12])
def test_lemma_4_1_degree(eps: float) -> None:
    """On [−R, R] the degree is at most twice max(log(1/ε) / log(log(1/ε)/R), R), of which the paper speaks."""
    for bound in (0.01, 0.1, 0.5, 1.0, 2.0, 4.0):
        found = smallest(bound, lambda polynomial: polynomial.delta <= eps, max_degree=60)
        if found is None:  # rounding of P(−R) is above eps
            assert exp(2 * bound) * 1e-16 > eps / 100
            continue
        digits = log(1 / eps)
        assert found.degree <= 2 * max(digits / log(max(e, digits / bound)), bound)


def exponent(digits: float, bound: float) -> float:
    """log(rank) / log(n) for n = e^digits, d = log n, ε = 1/n and scores up to `bound`, with Taylor's degree."""
    degree = int(bound)
    while 2 * bound + (degree + 1) * log(bound) - lgamma(degree + 2) > -digits:
        degree += 1
    return log(rank(int(digits), degree)) / digits


def test_theorem_4_2_the_rank_is_a_vanishing_power_of_n_only_below_the_border() -> None:
    """B constant: the exponent of the rank in n falls. R = B³ = log n, the border of Theorem 5.3: it does not."""
    sizes = (10.0, 100.0, 1000.0, 4000.0)
    below, at = ([exponent(x, bound(x)) for x in sizes] for bound in (lambda x: 1.0, lambda x: x))
    assert all(a > b for a, b in pairwise(below))
    assert below[-1] < 0.6
    assert all(1 < a < b for a, b in pairwise(at))


class Operations:
    """Multiplications and additions that array-api-strict is asked for: of matrix products, and by entry."""

    def __init__(self, library: Any, patch: pytest.MonkeyPatch) -> None:
        if library.name != "strict":
            pytest.skip("counts the operations of array-api-strict")
        kind = type(library.array(np.ones(1)))
        self.counted = 0
        product, by_entry = kind.__matmul__, kind.__mul__

        def matmul(a: Any, b: Any) -> Any:
            result = product(a, b)
            self.counted += 2 * result.size * a.shape[-1]
            return result

        def multiply(a: Any, b: Any) -> Any:
            result = by_entry(a, b)
            self.counted += result.size
            return result

        patch.setattr(kind, "__matmul__", matmul)
        patch.setattr(kind, "__mul__", multiply)

    def of(self, function: Callable[[], Any]) -> tuple[int, Any]:
        before = self.counted
        result = function()
        return self.counted - before, result


@pytest.fixture
def operations(library: Any, monkeypatch: pytest.MonkeyPatch) -> Operations:
    return Operations(library, monkeypatch)


def rows_times(m: Matrices, count: int) -> Matrices:
    """The same rows `count` times, so that nothing but their number changes."""
    return {name: np.tile(value, (count, 1)) if name[0] in "ae" else value for name, value in m.items()}


@pytest.mark.libraries("strict")
def test_theorem_4_2_operations_grow_with_the_rows(library: Any, operations: Operations) -> None:
    m = draw(lengths=(300, 200, 250), widths=(2,) * 5, dim=2, value_dim=2, size=0.5)
    counts, degrees = [], []
    for count in (1, 2, 4):
        problem = problem_of(library, rows_times(m, count))
        counted, result = operations.of(lambda p=problem, k=count: loss_gradient(p, eps=1e-4 * k, method="polynomial"))
        counts.append(counted)
        degrees.append(result.plan.degree)
    assert len(set(degrees)) == 1
    assert counts[1] < 2.01 * counts[0]
    assert counts[2] < 2.01 * counts[1]


@pytest.mark.libraries("strict")
def test_lemma_4_1_operations_grow_with_the_rows(library: Any, operations: Operations) -> None:
    """Forward, and forward with gradients."""
    arrays = np.random.default_rng(0).uniform(-1, 1, (5, 300, 3))

    def computed(count: int, gradient: bool) -> int:
        q, *rest = library.arrays(*(np.tile(a, (count, 1)) for a in arrays))

        def forward() -> Any:
            return tattn.tensor_attention(q, rest[:2], rest[2:], method="polynomial")

        def both() -> Any:
            out, pullback = tattn.tensor_attention_vjp(q, rest[:2], rest[2:], method="polynomial")
            return pullback(out)

        return operations.of(both if gradient else forward)[0]

    for gradient in (False, True):
        assert computed(2, gradient) < 2.01 * computed(1, gradient)


@pytest.mark.libraries("strict")
def test_theorem_3_3_operations_grow_with_the_cube(library: Any, operations: Operations) -> None:
    """The closed form takes every triple of rows; remark E.1."""
    m = draw(lengths=(16, 16, 16), widths=(2,) * 5, dim=2, value_dim=2)
    problems = [problem_of(library, rows_times(m, count)) for count in (1, 4)]
    small, large = (operations.of(lambda p=problem: exact_gradient(p))[0] for problem in problems)
    assert 40 < large / small <= 64


@pytest.mark.libraries("strict")
def test_definition_3_2_operations_are_those_that_a_plan_states(library: Any, operations: Operations) -> None:
    """2 a b c for a product of (a, b) and (b, c): the greater part of what either method does."""
    rng = np.random.default_rng(0)
    arrays = rng.uniform(-0.5, 0.5, (5, 600, 3))
    q, *rest = library.arrays(*arrays)
    many = library.arrays(*rng.uniform(-0.5, 0.5, (2, 600, 15)))
    for degree in (4, 6):
        # Few columns of values take more operations in less time: docs/adjoint.md.
        for values, most in ((many, 1.2), (rest[2:], 3 * degree / (2 + degree))):
            plan = tattn.plan(q, rest[:2], values, degree=degree)
            counted, _ = operations.of(lambda v=values, p=plan: tattn.tensor_attention(q, rest[:2], v, plan=p))
            assert 0.9 < counted / plan.flops_polynomial < most
    q, *rest = library.arrays(*arrays[:, :40])
    counted, (_, plan) = operations.of(
        lambda: tattn.tensor_attention(q, rest[:2], rest[2:], method="exact", return_plan=True)
    )
    # It counts exponentials, too, which are no products.
    assert 0.3 < counted / plan.flops_exact < 1


# Section 5, an illustration: how the reduction gets a forward pass out of gradients.


def test_theorem_5_3_gradients_along_a_ray_add_up_to_the_loss(library: Any) -> None:
    """d Loss(λX)/dλ = ⟨G(λX), X⟩, so an algorithm for the gradient, called at some λ, computes the loss."""
    m = random_matrices()
    nodes, weights = leggauss(10)

    def at(factor: float) -> TrainingProblem:
        return problem_of(library, {**m, "x1": factor * m["x1"]})

    total = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        total += weight * (library.numpy(exact_gradient(at(node))) * core(m)).sum()
    difference = library.numpy(loss(at(1.0), method="exact")) - library.numpy(loss(at(0.0), method="exact"))
    np.testing.assert_allclose(total, difference, rtol=1e-9)


# The page that maps the paper to the code.

STATEMENTS = {
    "2": range(1, 10), "3": range(1, 4), "4": range(1, 7), "5": range(1, 4), "C": range(1, 22), "D": range(1, 11),
    "E": range(1, 8), "F": range(1, 9), "G": range(1, 4),
}  # fmt: skip
# Statements about all algorithms, which no test shows.
HARDNESS = {"5.1", "5.2", "5.3", "G.1", "G.2", "G.3"}


def page_rows() -> dict[str, tuple[str, str, str]]:
    """(statement, functions, tests) of every number; a row may stand for several."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 4:
            continue
        for number in re.findall(r"\b(?:[A-G]|[2-5])\.\d+", cells[0]):
            assert number not in rows, f"{number} is there twice"
            rows[number] = (cells[1], cells[2], cells[3])
    return rows


@cache
def names_in(file: Path) -> frozenset[str]:
    """Functions and classes of a test file, methods as Class::method."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return frozenset(names)


def test_the_page_has_every_statement() -> None:
    expected = {f"{section}.{i}" for section, numbers in STATEMENTS.items() for i in numbers}
    assert page_rows().keys() == expected


def test_every_statement_has_a_test_and_hardness_its_experiment() -> None:
    for number, (_, functions, tests) in page_rows().items():
        if number in HARDNESS:
            assert "evidence/index" in functions + tests, number
        else:
            assert re.search(r"`test_\w+\.py::test_\w+`", tests), number


def test_tests_named_on_the_page_exist() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::([\w:]+)`", PAGE.read_text(encoding="utf-8")))
    assert len(named) > 50
    files = {file.name: file for file in Path(__file__).parents[1].rglob("test_*.py")}
    for file, name in named:
        assert name in names_in(files[file]), f"{file}::{name}"


def test_functions_named_on_the_page_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"\{py:(\w+)\}`(?:[\w.]+ <|~)([\w.]+)>?`", text)
    assert len(set(named)) > 25
    assert len(named) == text.count("{py:")
    for role, name in set(named):
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, type) if role == "class" else callable(found), name


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (PAGE.parent / "api").glob("*.md"))
    for name in set(tattn.__all__) - {"__version__"}:
        assert re.search(rf"\btattn\.{name}\b", pages), name
