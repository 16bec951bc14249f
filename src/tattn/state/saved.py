"""Summaries in files: plan, sums and rests, read without trust in who wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..files import Archive, Path, replacing
from ..plans import Plan
from ..stored import plan_of_facts
from .checks import check_streams, checked_parts

_FORMAT, _VERSION = "tattn.Summary", 1


def write(path: Path, plan: Plan, parts: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Write a plan, and sums and rests by name; ValueError for a plan that `read` would refuse."""
    arrays: Any = {f"{name}_{i}": a for name, of_views in parts.items() for i, a in enumerate(of_views)}
    facts = plan.facts()
    plan_of_facts(facts)
    about = json.dumps({"format": _FORMAT, "version": _VERSION, "plan": facts})
    with replacing(path) as file:
        np.savez(file, about=np.array(about), **arrays)


def read(path: Path) -> tuple[Plan, list[np.ndarray]]:
    """Plan, and sums and rests one after another, of a file that `write` wrote."""
    with open(path, "rb") as file:
        try:
            archive = Archive(file)
            plan = _about(archive.text("about"))
            names = [f"{name}_{i}" for name in ("sums", "rests") for i in range(plan.order - 1)]
            if archive.names != {"about", *names}:
                raise ValueError(f"there should be sums and rests of {plan.order - 1} views, and nothing else")
            # Arrays of these shapes that take no memory.
            headers = (archive.header(name) for name in names)
            empty = [np.broadcast_to(np.empty((), h.dtype.newbyteorder("=")), h.shape) for h in headers]
            checked_parts(plan, tuple(empty[: plan.order - 1]), tuple(empty[plan.order - 1 :]))
            return plan, [archive.array(name) for name in names]
        except (TypeError, ValueError) as found:
            raise ValueError(
                f"path should be a file that Summary.save wrote, {os.fsdecode(path)!r} is not or is damaged: {found}"
            ) from None


def _about(text: str) -> Plan:
    """The plan of a file, from what the file says of itself."""
    try:
        about = json.loads(text)
    except RecursionError:
        raise ValueError("its plan is no plan") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ValueError("it holds something else")
    if about.get("version") != _VERSION:
        raise ValueError(f"it is of version {about.get('version')!r:.40}, this is version {_VERSION}")
    plan = plan_of_facts(about.get("plan"))
    check_streams(plan)
    return plan
