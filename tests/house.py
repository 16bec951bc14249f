"""The house in numbers: `python tests/house.py` prints them, and fails where an import points up or a function takes too much."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "tattn"
# What users import, and the command line, stand above all.
ABOVE = ("__init__", "__main__")
MOST_PARAMETERS, LONG_LINE, LONG_FILE = 6, 120, 400
# Functions that take more, and why.
_PUBLIC = "public: one keyword for each option"
_OPERATOR = "torch reads an operator's arguments from its schema, one by one"
_LOOP = "numba compiles loops over arrays and numbers, and no records of them"
EXCEPTIONS = {
    "attention.tensor_attention": _PUBLIC,
    "attention.tensor_attention_vjp": _PUBLIC,
    "planning.plan": _PUBLIC,
    "planning.plan_for": _PUBLIC,
    "planning.measure.measure_error": _PUBLIC,
    "planning.tolerance.best_tol": _PUBLIC,
    "state.summary.summarize": _PUBLIC,
    "state.decoding.DecodingState.step": _PUBLIC,
    "distributed.torch.tensor_attention": _PUBLIC,
    "distributed.torch.plan": _PUBLIC,
    "distributed.dask.tensor_attention": _PUBLIC,
    "distributed.dask.tensor_attention_vjp": _PUBLIC,
    "nn.torch.TensorAttention.__init__": _PUBLIC,
    "nn.torch.TensorAttention.forward": _PUBLIC,
    "nn.jax.apply": _PUBLIC,
    "distributed.operator._forward": _OPERATOR,
    "distributed.operator._backward": _OPERATOR,
    "backends.compiled": _LOOP,
}


def layers() -> list[list[str]]:
    """The lines of CONTRIBUTING's list of rooms, the lowest last."""
    found = re.search(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return [re.findall(r"\w+", line) for line in found[1].strip().splitlines()]


def modules() -> dict[str, ast.Module]:
    """Every module of `tattn` by its name within the package: "planning.choice", "planning" for its `__init__`, "" for tattn's."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def rooms() -> list[str]:
    """Modules and packages that stand in `tattn` itself."""
    return sorted({f.relative_to(SOURCE).parts[0].removesuffix(".py") for f in SOURCE.rglob("*.py")} - {*ABOVE})


def imports(name: str, trees: dict[str, ast.Module]) -> set[str]:
    """Modules of `tattn` that a module imports from, anywhere in it; names of `tattn` itself by themselves."""
    found = set()
    package = name.split(".") if (SOURCE / name.replace(".", "/")).is_dir() else name.split(".")[:-1]
    for node in ast.walk(trees[name]):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("tattn.") for a in node.names if a.name.startswith("tattn.")}
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and (node.module or "").split(".")[0] != "tattn":
                continue
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [part for part in (*base, *(node.module or "").split(".")[not node.level :]) if part]
            for alias in node.names:
                inside = ".".join((*base, alias.name))
                found.add(inside if inside in trees or not base else ".".join(base))
    return found


def crossings(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """Modules and the other rooms that they import from; anything knows the version."""
    found = {
        (name, other.split(".")[0]) for name in trees if name not in ("", "__main__") for other in imports(name, trees)
    }
    return {(name, room) for name, room in found if room not in (name.split(".")[0], "__version__")}


def upward(trees: dict[str, ast.Module]) -> list[str]:
    """Imports between rooms that do not lead to a line below, and circles of files."""
    line = {room: number for number, names in enumerate(layers()) for room in names}
    found = [
        f"{name} imports {room}, which is no line below"
        for name, room in sorted(crossings(trees))
        if line.get(room, -1) <= line[name.split(".")[0]]
    ]
    try:
        TopologicalSorter({name: imports(name, trees) for name in trees if name}).prepare()
    except CycleError as circle:
        found.append(f"a circle: {' → '.join(circle.args[1])}")
    return found


def wide(trees: dict[str, ast.Module]) -> dict[str, int]:
    """Functions with more than `MOST_PARAMETERS`, self and cls not counted, and how many they have."""
    found = {}

    def look(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = name
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = f"{name}.{child.name}".removeprefix(".")
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                a = child.args
                given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]
                count = sum(x.arg not in ("self", "cls") for x in given)
                if count > MOST_PARAMETERS:
                    found[inside] = count
            look(child, inside)

    for name, tree in trees.items():
        look(tree, name)
    return found


def main() -> int:
    """Print the numbers, and what is wrong."""
    trees = modules()
    lines = {f.relative_to(SOURCE): f.read_text(encoding="utf-8").splitlines() for f in SOURCE.rglob("*.py")}
    between = {(name.split(".")[0], room) for name, room in crossings(trees)}
    many, above = wide(trees), upward(trees)
    long_files = sorted((len(text), str(file)) for file, text in lines.items() if len(text) > LONG_FILE)
    for what, number in (
        ("rooms", len(rooms())),
        ("imports between rooms", len(between)),
        ("imports upward, and circles", len(above)),
        (f"functions with more than {MOST_PARAMETERS} parameters", len(many)),
        (f"lines over {LONG_LINE} characters", sum(len(x) > LONG_LINE for text in lines.values() for x in text)),
        (f"files over {LONG_FILE} lines", ", ".join(f"{file} {n}" for n, file in long_files) or 0),
        ("lines in the wheel", f"{sum(map(len, lines.values())):,}"),
    ):
        print(f"{what:<40} {number}")
    # An exception is a function, or all of a module.
    excused = {name: {other for other in EXCEPTIONS if f"{name}.".startswith(f"{other}.")} for name in many}
    wrong = above + [f"{name} takes {n} parameters" for name, n in many.items() if not excused[name]]
    wrong += [
        f"{name} is an exception, and takes no more than others"
        for name in EXCEPTIONS
        if name not in set().union(*excused.values())
    ]
    for text in wrong:
        print(text, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
