"""The page: what every part says, and what it ran on."""

from __future__ import annotations

from collections.abc import Sequence

from .tables import Table, markdown, seconds

_COMMAND = "python -m evidence measure"
_INTRO = """\
# Evidence

<!-- Made by `{command}` from the tables in this folder. Changes made by hand are lost. -->

The paper ([arXiv 2405.16411](https://arxiv.org/abs/2405.16411)) proves that tensor attention and its gradient take almost
linear time while entries are bounded, and truly cubic time in general. It has no experiments. Here are some: runtime, memory,
numerical stability, quality of the polynomial, and whether the assumption is met in practice, for order
three as in the paper. Every number below comes from the tables (CSV) that stand beside this page, and

```sh
{command}
```

measures them all again, in {total} of one processor of the machine described at the end; `nox -s evidence` does
the same in an environment of its own, and `--only NAME` one part. Random draws are seeded: only times and
memory differ from run to run.
"""


def page(sections: Sequence[tuple[str, str, str]], machines: Table) -> str:
    """All sections (name, title, words), with the command of each, and the machines."""
    order = [name for name, *_ in sections]
    machines = sorted(machines, key=lambda row: order.index(row["part"]))
    total = seconds(sum(row["seconds"] for row in machines))
    parts = [_INTRO.format(command=_COMMAND, total=total)]
    if any(row["quick"] for row in machines):
        quick = ", ".join(row["part"] for row in machines if row["quick"])
        parts.append(f"**A quick run, of small sizes, not to be quoted: {quick}.**\n")
    for name, title, words in sections:
        took = next(row["seconds"] for row in machines if row["part"] == name)
        parts.append(f"## {title}\n\n`{_COMMAND} --only {name}`, {seconds(took)} of the processor\n\n{words.strip()}\n")
    parts.append("## Machine\n\n" + _machines(machines) + "\n")
    return "\n".join(parts)


def _machines(machines: Table) -> str:
    """What differs between the parts as a table, what does not as a list."""
    if not machines:
        return "No part has run."
    names = [n for n in machines[0] if n not in ("part", "quick", "seconds")]
    same = [n for n in names if len({str(row[n]) for row in machines}) == 1]
    lines = [f"* {n}: {machines[0][n]}" for n in same]
    other = [n for n in names if n not in same]
    if other:
        rows = [[row["part"], *(str(row[n]) for n in other)] for row in machines]
        lines += ["", markdown(rows, ["part", *other])]
    return "\n".join(lines) + "\n\nThe machine is shared: ratios of times of one part mean more than the times."
