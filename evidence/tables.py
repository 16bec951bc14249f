"""Tables: lists of rows, saved as CSV and read back as they were saved."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from math import isfinite, log10
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Table = list[Row]


def save(table: Table, path: Path, digits: int = 6) -> None:
    """Write a table, numbers with so many digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)


def load(path: Path) -> Table:
    """Read a table: numbers as int or float, True and False, text otherwise."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: _value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def where(table: Table, **wanted: Any) -> Table:
    """The rows that have these values."""
    return [row for row in table if all(row[k] == v for k, v in wanted.items())]


def column(table: Table, name: str) -> list[Any]:
    """One entry of every row."""
    return [row[name] for row in table]


def distinct(table: Table, *names: str) -> list[tuple[Any, ...]]:
    """The different values of some columns, in order of appearance."""
    return list(dict.fromkeys(tuple(row[n] for n in names) for row in table))


def markdown(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """A table for the page."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def listed(values: Sequence[Any], form: Callable[[Any], str] = str) -> str:
    """'1, 2 and 3'."""
    words = [form(v) for v in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def short(number: float) -> str:
    """Two or three digits, as a person writes them: 0.0012, 1.3e-07, 2.5, 16,384."""
    if not isfinite(number):
        return "∞" if number > 0 else "–"
    if number == 0:
        return "0"
    size = log10(abs(number))
    if size >= 6 or size < -3:
        mantissa, power = f"{number:.1e}".split("e")
        return f"{mantissa}e{int(power)}"
    if size >= 3:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def seconds(number: float) -> str:
    """A time."""
    if number < 1:
        return f"{1000 * number:.3g} ms"
    return f"{number:.3g} s" if number < 120 else f"{number / 60:.1f} min"


def duration(number: float) -> str:
    """A time in the unit a person would use, from milliseconds to years, with two digits or whole."""
    units = (31557600, "years"), (86400, "days"), (3600, "hours"), (60, "minutes"), (0.1, "s"), (0.0, "ms")
    size, unit = next(pair for pair in units if number >= pair[0])
    found = number / {"s": 1, "ms": 1e-3}.get(unit, size)
    return f"{found:,.0f} {unit}" if found >= 10 else f"{found:.2g} {unit}"


def mebibytes(number: float) -> str:
    """Bytes in MiB."""
    size = number / 2**20
    return f"{size:,.0f}" if size >= 1000 else f"{size:.3g}"
