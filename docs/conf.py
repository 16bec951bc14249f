"""Sphinx configuration: `nox -s docs` builds with warnings as errors."""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import sys
from collections.abc import Callable
from math import ceil, inf, log2
from pathlib import Path
from typing import Any

import ziamath
from docutils import nodes

import tattn
from tattn.__main__ import main as tattn_main
from tattn.approximation.exponential import minimax
from tattn.features.monomials import rank
from tattn.planning.settings import MAX_RANK
from tattn.plans import si

# Beside this folder, and no part of what is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))
from evidence.__main__ import main as evidence_main

project = "tattn"
version = release = tattn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_generated", "bands", "benchmarks", "causal", "layers", "packed", "scaling"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# A line may start with a per cent sign.
myst_disable_syntax = ["myst_line_comment"]
# Formulas in indented blocks are no code.
highlight_language = "none"

# Names in single backticks link where they are documented; the others, of parameters, are code.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", r".*"), ("py:class", r"(?!tattn\.).*")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Array": "Array", "Body": "Body", "Pullback": "Pullback"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
numpydoc_show_class_members = False

# Formulas are drawn into the pages, which need no script, no font and no network to show them.
html_math_renderer = "drawn"
ziamath.config.svg2 = False
# Prompts and output are not copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
# Room for a line of 88 characters.
_SIZES = {"code-font-size": "75%"}
html_theme_options = {"light_css_variables": _SIZES, "dark_css_variables": _SIZES}
html_title = f"tattn {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False

_GENERATED = Path(__file__).parent / "_generated"


def _help(main: Callable[[list[str]], int], *arguments: str) -> str:
    """What a command line prints with ``--help`` behind some arguments."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return text.getvalue()


def _commands(package: str, main: Callable[[list[str]], int]) -> str:
    """The help of the command line of a package, and of each of its commands."""
    os.environ["COLUMNS"] = "88"
    top = _help(main)
    names = re.search(r"\{([\w,]+)\}", top)
    assert names
    called = f"python -m {package}"
    parts = [(called, top), *((f"{called} {name}", _help(main, name)) for name in names[1].split(","))]
    return "\n".join(f"## {title}\n\n```text\n{text.rstrip()}\n```\n" for title, text in parts)


def _table(corner: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    lines = [[corner, *columns], ["--:"] * (len(columns) + 1), *([name, *cells] for name, cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _power(number: float) -> str:
    """A power of ten as Python would take it: 1e-3."""
    return f"{number:.0e}".replace("e-0", "e-")


def _ranks() -> str:
    """C(d + g, g), and a dash beyond the largest rank of a plan."""

    def cell(dim: int, degree: int) -> str:
        found = rank(dim, degree)
        return f"{found:,}" if found <= MAX_RANK else "—"

    degrees = [1, 2, 3, 4, 5, 6, 8, 10]
    rows = [(f"d = {d}", [cell(d, g) for g in degrees]) for d in (2, 4, 8, 12, 16, 24, 32, 64, 128)]
    return _table("", [f"g = {g}" for g in degrees], rows)


def _degrees() -> str:
    """The least degree whose minimax polynomial keeps the relative error, without rounding."""

    def cell(bound: float, delta: float) -> str:
        found = next((g for g in range(41) if minimax(g, bound).delta <= delta), None)
        return "—" if found is None else str(found)

    deltas = [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8]
    rows = [(f"R = {bound:g}", [cell(bound, delta) for delta in deltas]) for bound in (0.25, 0.5, 1, 2, 3, 4, 6, 8)]
    return _table("", [f"δ = {_power(delta)}" for delta in deltas], rows)


def _reach() -> str:
    """The largest promised range that a certified plan serves, among powers of 2^(1/4)."""

    def cell(dim: int, dtype: str, tol: float) -> str:
        largest = -inf
        for i in range(-16, 17):
            try:
                tattn.plan_for(n=10**6, dim=dim, bound=2 ** (i / 4), tol=tol, dtype=dtype, method="polynomial")
            except tattn.PlanError:
                break
            largest = 2 ** (i / 4)
        return "—" if largest < 0 else f"{largest:.2g}"

    tols = [1e-1, 1e-2, 1e-3, 1e-4, 1e-6]
    rows = [(f"{dtype}, d = {d}", [cell(d, dtype, tol) for tol in tols]) for dtype in ("float32", "float64")
            for d in (4, 8, 16, 32)]  # fmt: skip
    return _table("", [f"tol = {_power(tol)}" for tol in tols], rows)


def _scaling() -> str:
    """What plans say of 10^9 rows on 1,024 workers at assumed rates."""
    n, workers, flops, bandwidth, latency = 10**9, 1024, 10e12, 50e9, 10e-6
    rows = []
    for dim in (4, 8, 16):
        plan = tattn.plan_for(n=n, dim=dim, bound=1.0, workers=workers, flops=flops, bandwidth=bandwidth)
        sending = plan.bytes_sent / bandwidth
        exact = plan.flops_exact / workers / flops / (365.25 * 86400)
        cells = [f"{plan.degree}, {plan.rank:,}", f"{plan.error:.1e}", f"{si(plan.flops_polynomial)}flop"]
        cells += [f"{si(plan.bytes_sent)}B", f"{sending * 1e3:.2g} ms", f"{plan.seconds * 1e3:.3g} ms"]
        rows.append((f"d = {dim}", [*cells, f"{plan.seconds_gradient * 1e3:.3g} ms", f"{exact:,.0f} years"]))
    columns = ["degree, rank", "certified error", "forward, all workers", "sent by each", "sending", "forward"]
    table = _table("", [*columns, "with gradient", "exact, forward"], rows)
    steps = 2 * ceil(log2(workers))
    return (
        f"n = {n:,} in query and in two views, dv = d, scores within ±1, tol = 1e-3, float32; {workers:,} workers, of which each "
        f"reaches {si(flops)}flop/s and sends {si(bandwidth)}B/s. These rates are assumed, not measured.\n\n{table}\n"
        f"Latency comes on top. At an assumed {latency * 1e6:.0f} µs a message, {steps} messages one after another up and down a "
        f"tree are {steps * latency * 1e3:.2g} ms for each sum; round a ring of {workers:,} they would be "
        f"{2 * (workers - 1) * latency * 1e3:.0f} ms, so buffers this small go by a tree.\n"
    )


def _generate() -> None:
    """Write the pages' parts that are computed: only where they changed, so that builds stay incremental."""
    _GENERATED.mkdir(exist_ok=True)
    for name, text in {
        "commands": _commands("tattn", tattn_main),
        "commands-evidence": _commands("evidence", evidence_main),
        "ranks": _ranks(),
        "degrees": _degrees(),
        "reach": _reach(),
        "scaling": _scaling(),
    }.items():
        file = _GENERATED / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


_generate()

_LITERAL = re.compile(r"(`[^`]*`)")


_PAGE = re.compile(r"docs/(\w+)\.md")


def _escaped(line: str) -> str:
    """|x| as text, which reStructuredText would take for a substitution, and pages of this documentation as links."""
    if line.lstrip().startswith(">>>"):
        return line
    line = "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in _LITERAL.split(line))
    return _PAGE.sub(r":doc:`\g<0> </\1>`", line)


def _prepare(_app: Any, what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read as they are: absolute values, and formulas in indented blocks of modules."""
    prepared: list[str] = []
    block: int | None = None  # indentation of the text around a block that is kept as it is
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and block is not None and indent <= block:
            block = None
        if what == "module" and block is None and indent and prepared and not prepared[-1]:
            prepared += ["::", ""]
            block = 0
        prepared.append(line if block is not None else _escaped(line))
        if line.lstrip().startswith(".. math::"):
            block = indent
    lines[:] = prepared


def _signature(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Type aliases by their name alone."""
    first, second = (text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returned))
    return first, second


def _break_names(app: Any, doctree: nodes.document, _name: str) -> None:
    """Let long names of tests break after an underscore, what is copied staying the name; in tables, one below the other."""
    if app.builder.format != "html":
        return
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext()
        if text.startswith("test_") and "::" in text:
            parts = "<wbr>".join(re.split(r"(?<=_)|(?<=::)", text))
            html = f'<code class="docutils literal notranslate">{parts}</code>'
            following = literal.next_node(nodes.Text, descend=False, siblings=True)
            if following == ", " and isinstance(literal.parent.parent, nodes.entry):
                following.parent.replace(following, nodes.raw("", "<br>", format="html"))
            literal.replace_self(nodes.raw("", html, format="html"))


# A number with its name, its exponent or its unit: n = 1,024, 1e-18, 38 %, 4.2 ms.
_NUMBER = re.compile(
    r"((?:\b\w{1,3} = )?[\d.,]*\d(?:e[-+−]\d+)?(?: (?:%|[mµ]?s|min|[kMGT]?i?B|[MGTPEZ]?flop)(?![\w]))?)"
)


def _keep_numbers_whole(app: Any, doctree: nodes.document, _name: str) -> None:
    """Let no line end between the parts of a number."""
    if app.builder.format != "html":
        return
    for text in list(doctree.findall(nodes.Text)):
        pieces = _NUMBER.split(text)
        whole = [bool(_NUMBER.fullmatch(piece)) and not re.fullmatch(r"[\d.,]+", piece) for piece in pieces]
        if any(whole) and not isinstance(text.parent, nodes.FixedTextElement | nodes.literal | nodes.raw):
            parts = [
                nodes.inline("", piece, classes=["number"]) if kept else nodes.Text(piece)
                for piece, kept in zip(pieces, whole, strict=True)
            ]
            text.parent.replace(text, parts)


def _drawn(formula: str, inline: bool) -> str:
    """A formula in TeX as SVG in the colour of the text, its baseline on that of the line; the TeX is what is read aloud."""
    # Sizes of delimiters that are commands, \\big\\langle, are unknown to it.
    formula = re.sub(r"\\[bB]igg?[lr]?(?=\\)", "", formula.strip())
    drawn = ziamath.Latex(formula, size=17, inline=inline, color="currentColor")
    text = html.escape(" ".join(formula.split()), quote=True)
    style = f"vertical-align: {drawn.getyofst():.1f}px" if inline else ""
    return drawn.svg().replace("<svg ", f'<svg class="formula" role="img" aria-label="{text}" style="{style}" ', 1)


def _inline_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(_drawn(node.astext(), inline=True))
    raise nodes.SkipNode


def _block_math(translator: Any, node: nodes.math_block) -> None:
    """A formula of its own, which scrolls where the page is narrow."""
    parts = [_drawn(part, inline=False) for part in node.astext().split("\n\n") if part.strip()]
    translator.body.append(f'<div class="math-block">{"<br>".join(parts)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Run before numpydoc, which takes docstrings apart."""
    app.add_html_math_renderer("drawn", (_inline_math, None), (_block_math, None))
    app.connect("doctree-resolved", _break_names)
    app.connect("doctree-resolved", _keep_numbers_whole)
    app.connect("autodoc-process-docstring", _prepare, priority=400)
    app.connect("autodoc-process-signature", _signature)
