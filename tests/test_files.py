"""Files of summaries: written whole or not at all, read only if they hold what they say; and plans that were written down."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import changed

import tattn
from tattn.features.monomials import rank
from tattn.plans import FACTS, Plan, plan_text
from tattn.stored import plan_of_facts


def summary(
    seed: int = 0, *, order: int = 3, dim: int = 2, dtype: str = "float32", grading: tuple[int, ...] = ()
) -> tattn.Summary:
    plan = tattn.plan_for(n=9, dim=dim, order=order, bound=1.0, degree=2, dtype=dtype)
    if grading:
        plan = changed(plan, grading=grading, rank=rank(dim, 2, grading))
    rows = list(np.random.default_rng(seed).uniform(-1, 1, (order - 1, 2, 5, dim)).astype(dtype))
    made = tattn.summarize(rows, rows, plan)
    return made + made


def same(a: tattn.Summary, b: tattn.Summary) -> bool:
    pairs = zip((*a.sums, *a.rests), (*b.sums, *b.rests), strict=True)
    return a.plan == b.plan and all(x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True) for x, y in pairs)


# Writing.


def test_a_path_may_be_bytes_or_like_one(tmp_path: Path) -> None:
    made = summary()
    for path in (str(tmp_path / "text"), os.fsencode(tmp_path / "bytes"), tmp_path / "like", tmp_path / ("n" * 255)):
        made.save(path)
        assert same(tattn.Summary.load(path), made)
    if sys.platform.startswith("linux"):
        path = os.fsencode(tmp_path) + b"/no\xfftext"
        made.save(path)
        assert same(tattn.Summary.load(path), made)
        with pytest.raises(ValueError, match=r"^path should be a file that Summary.save wrote, "):
            Path(os.fsdecode(path)).write_bytes(b"")
            tattn.Summary.load(path)
    for path in (3, None):
        with pytest.raises(TypeError):
            made.save(path)  # type: ignore[arg-type]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_modes_are_those_of_the_umask_or_of_the_file_replaced(tmp_path: Path) -> None:
    path, before = tmp_path / "file", os.umask(0o027)
    try:
        summary().save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o444):
            path.chmod(mode)
            summary().save(path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link, twice = tmp_path / "folder" / "file", tmp_path / "link", tmp_path / "twice"
    link.symlink_to("folder/file")
    twice.symlink_to(link)
    for seed, path in enumerate((link, twice, link)):
        summary(seed).save(path)
        assert link.is_symlink() and twice.is_symlink() and not target.is_symlink()
        assert same(tattn.Summary.load(target), summary(seed))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "link", "twice"]
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(OSError, match="symbolic links"):
        summary().save(link)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "file.part").symlink_to(victim)
    summary().save(tmp_path / "file")
    # Even for who knows the name.
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (tmp_path / ".tattn-known.part").symlink_to(victim)
    with pytest.raises(FileExistsError, match=r"file'$"):
        summary().save(tmp_path / "file")
    assert victim.read_text() == "precious"
    assert (tmp_path / ".tattn-known.part").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path) -> None:
    pipe, link, copy = tmp_path / "pipe", tmp_path / "link", tmp_path / "copy"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(pipe.read_bytes)
            summary().save(path)
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        copy.write_bytes(read.result())
        assert same(tattn.Summary.load(copy), summary())
    with pytest.raises(IsADirectoryError):
        summary().save(tmp_path)
    with pytest.raises(FileNotFoundError):
        summary().save("")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("at", ["numpy.savez", "os.fsync", "os.replace"])
def test_an_error_changes_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: str
) -> None:
    path, made = tmp_path / "file", summary()
    summary(1).save(path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(at, fail)
        with pytest.raises(type(error)):
            made.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert same(tattn.Summary.load(path), summary(1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_disk_that_fills_leaves_nothing(tmp_path: Path) -> None:
    script = """
import resource, signal, sys, numpy as np, tattn
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
plan = tattn.plan_for(n=9, dim=4, bound=1.0, degree=6)
made = tattn.summarize([np.ones((3, 4), "f4")] * 2, [np.ones((3, 64), "f4")] * 2, plan)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    made.save(sys.argv[1])
except OSError as found:
    print(found.strerror)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "file"], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_the_error_names_the_path_that_was_given(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.file'$"):
        summary().save(tmp_path / "nowhere" / "file")


def test_many_at_once_each_write_a_whole_file(tmp_path: Path) -> None:
    path, made = tmp_path / "file", [summary(seed) for seed in range(4)]
    made[0].save(path)
    saving = """
import sys, tattn
for made in [tattn.Summary.load(name) for name in sys.argv[2:]] * 10:
    made.save(sys.argv[1])
"""
    copies = [tmp_path / f"copy-{seed}" for seed in range(4)]
    for one, copy in zip(made, copies, strict=True):
        one.save(copy)
    command = [sys.executable, "-c", saving, path, *copies]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        saved = [pool.submit(one.save, path) for one in made * 5]
        while any(process.poll() is None for process in processes):
            found = tattn.Summary.load(path)
            assert any(same(found, one) for one in made)
    for one in saved:
        one.result()
    assert [process.communicate()[1] for process in processes] == [b"", b""]
    assert sorted(tmp_path.iterdir()) == sorted([path, *copies])


# Reading.

Check = Callable[[bytes, Callable[[tattn.Summary], object]], bool]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Load such bytes: whether that is refused, which takes the one error and little time; else what must hold."""
    path = tmp_path / "file.npz"

    def checked(content: bytes, holds: Callable[[tattn.Summary], object]) -> bool:
        path.write_bytes(content)
        start = time.process_time()
        try:
            found = tattn.Summary.load(path)
        except ValueError as error:
            assert type(error) is ValueError
            assert str(error).startswith(
                f"path should be a file that Summary.save wrote, {str(path)!r} is not or is damaged"
            )
            assert len(str(error)) < 1000
            found = None
        assert time.process_time() - start < 2
        assert found is None or holds(found)
        return found is None

    return checked


def saved(made: tattn.Summary) -> bytes:
    """The file."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        made.save(Path(folder, "file"))
        return Path(folder, "file").read_bytes()


MADE = [
    summary(),
    summary(1, order=2, dim=1, dtype="float64"),
    summary(2, order=4, dim=3, grading=(1, 2, 3)),
]


def entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as written:
        for name, content in parts.items():
            written.writestr(name, content)
    return file.getvalue()


def header(text: bytes, version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def array(of: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, of)
    return file.getvalue()


@pytest.mark.parametrize("made", MADE)
def test_a_damaged_file_is_refused_or_harmless(check: Check, made: tattn.Summary) -> None:
    """Cut, flipped, overwritten, mixed with another: the very same summary or the one error."""
    whole, other, rng = saved(made), saved(summary(7)), random.Random(0)

    def harmless(found: tattn.Summary) -> bool:
        return same(found, made) or same(found, summary(7))

    assert not check(whole, harmless)
    directory = whole.index(b"PK\1\2")
    refused = 0
    for _ in range(40):
        i, j, k = sorted(rng.sample(range(len(whole)), 3))
        flipped, overwritten = bytearray(whole), bytearray(whole)
        flipped[i] ^= 1 << rng.randrange(8)
        for at in rng.sample(range(directory, len(whole)), 3):
            overwritten[at] = rng.randrange(256)
        damaged = [
            whole[:i], whole[j:], whole[:i] + whole[j:], whole[:j] + whole[i:], whole[:i] + bytes(j - i) + whole[j:],
            whole[:i] + whole[j:k] + whole[i:], whole[:i] + other[i:], flipped, overwritten,
        ]  # fmt: skip
        refused += sum(check(bytes(content), harmless) for content in damaged)
    assert refused > 240
    # Every field of the directory, one byte after another, at its ends.
    for at in range(directory, len(whole) - 4, 3):
        for value in (0, 0x7FFFFFFF, 0xFFFFFFFF):
            check(whole[:at] + struct.pack("<I", value) + whole[at + 4 :], harmless)


@pytest.mark.parametrize("made", MADE)
def test_archives_that_numpy_would_not_write(check: Check, made: tattn.Summary) -> None:
    parts = entries(saved(made))

    def unchanged(found: tattn.Summary) -> bool:
        return same(found, made)

    assert not check(archive(parts), unchanged)
    assert not check(archive(dict(reversed(parts.items()))), unchanged)
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert check(archive(parts, compression), unchanged)
    assert check(archive({**parts, "more.npy": b""}), unchanged)
    assert check(archive({**parts, "sums_9.npy": parts["sums_0.npy"]}), unchanged)
    for name, content in parts.items():
        assert check(archive({n: c for n, c in parts.items() if n != name}), unchanged)
        for cut in (b"", content[:-1], content + b"\0", content[:100], array(np.ones(3)), array(np.array("{}"))):
            assert check(archive({**parts, name: cut}), unchanged)
        with pytest.warns(UserWarning, match="Duplicate name"):
            twice = io.BytesIO(archive(parts))
            with zipfile.ZipFile(twice, "a") as more:
                more.writestr(name, content)
        assert check(twice.getvalue(), unchanged)
    # A directory at the end of all numbers, by the record for large files.
    content = archive(parts)
    for at in (2**63, 2**64 - 1):
        large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, at, at)
        large += struct.pack("<4sLQL", b"PK\6\7", 0, len(content) - 22, 1)
        assert check(content[:-22] + large + content[-22:-12] + b"\xff" * 10 + b"\0\0", unchanged)


@pytest.mark.parametrize(
    "text",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 999999999999999999), }\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -3), }\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1, " * 100 + b"), }\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",), }\n",
        b"{'descr': '<f2', 'fortran_order': False, 'shape': (6, 3), }\n",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (6, 3), }\n",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6, 3), }\n",
        b"{'descr': '<U99999999', 'fortran_order': False, 'shape': (), }\n",
        b"{'descr': '<U0', 'fortran_order': False, 'shape': (), }\n",
        b"__import__('os').abort()\n",
        b"(" * 9000 + b"\n",
        b"[" * 60_000 + b"\n",
        b"'",
        b"\xff\xfe\n",
        b"",
    ],
)
def test_headers_that_numpy_would_not_write(check: Check, text: bytes) -> None:
    parts = entries(saved(MADE[0]))
    for name, content in parts.items():
        for version in (b"\1\0", b"\2\0", b"\3\0", b"\xff\xff"):
            for data in (b"", b"\0" * 12, content[128:]):
                assert check(archive({**parts, name: header(text, version) + data}), lambda _: False)


def test_layouts_of_other_machines_are_read(check: Check) -> None:
    made = MADE[0]
    parts = entries(saved(made))
    for i, of_view in enumerate(made.sums):
        parts[f"sums_{i}.npy"] = array(np.asfortranarray(of_view.astype(">f4")))
    assert not check(archive(parts), lambda found: same(found, made) and all(s.dtype.isnative for s in found.sums))


def test_a_small_file_that_says_it_is_large(check: Check) -> None:
    """A thousandth of what it unpacks to, and plans of a rank that nobody has memory for."""
    parts = entries(saved(MADE[0]))
    zeros = header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (6, 100000000), }\n") + bytes(50 << 20)
    bomb = archive({**parts, "sums_0.npy": zeros}, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    assert check(bomb, lambda _: False)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    about = json.loads(str(np.load(io.BytesIO(parts["about.npy"]))))
    for edit in (
        {"dim": 10**18, "degree": 100, "rank": 10**18},
        {"dim": 300_000, "grading": [1 + i % 60 for i in range(300_000)], "rank": 6},
        {"dim": 4096, "grading": [2 + i % 60 for i in range(4096)], "degree": 100, "rank": 6},
        {"grading": [10**18, 10**18]},
        {"coefficients": [1.0] * 500_000},
        {"order": 10**9},
        {"reason": "x" * 10**6},
    ):
        text = json.dumps({**about, "plan": {**about["plan"], **edit}})
        content = archive({**parts, "about.npy": array(np.array(text))})
        tracemalloc.start()
        assert check(content, lambda found: len(found.plan.reason) == 10**6) == ("reason" not in edit)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(content)
        tracemalloc.stop()


NASTY: list[Any] = [
    None, True, 0, 1, -1, 2, 3, 10**9, 2**63, 10**400, 0.5, -1.0, inf, -inf, nan, "", "polynomial", "exact", "banded",
    "float64", "x" * 1000, "\ud800", [], [1, 2], [1.0, 2.0, 3.0], [[1]], [None], [nan] * 3, [10**30] * 3, {}, [0, 0],
    [10**6] * 2,
]  # fmt: skip


@pytest.mark.parametrize("made", MADE)
def test_plans_that_contradict_themselves_are_refused(check: Check, made: tattn.Summary) -> None:
    """What is changed by hand, and still is of one plan, is read as it stands."""
    parts = entries(saved(made))
    about = json.loads(str(np.load(io.BytesIO(parts["about.npy"]))))

    def written(text: str) -> bytes:
        return archive({**parts, "about.npy": array(np.array(text))})

    refused = set()
    for fact in FACTS:
        for value in NASTY:
            edit = {**about["plan"], fact: value}

            def of_one_plan(found: tattn.Summary, edit: dict[str, Any] = edit) -> bool:
                lists = {name: list(v) if isinstance(v, tuple) else v for name, v in found.plan.facts().items()}
                out = found.attend(np.ones((3, found.plan.dim), found.plan.dtype))
                return lists == edit and out.shape == (2, 3, made.plan.dim) and str(found.plan) != ""

            if check(written(json.dumps({**about, "plan": edit})), of_one_plan):
                refused.add(fact)
        lacking = {name: value for name, value in about["plan"].items() if name != fact}
        assert check(written(json.dumps({**about, "plan": lacking})), lambda _: False)
    assert refused == {*FACTS}
    for value in NASTY:
        assert check(written(json.dumps(value)), lambda _: False)
        for name in ("plan", "format"):
            assert check(written(json.dumps({**about, name: value})), lambda _: False)
    for text in ("[" * 200_000, '{"a":' * 50_000, "1" * 5000, "", "nul", '"', "[1,"):
        assert check(written(text), lambda _: False)


def test_a_plan_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    made = summary()
    for name, size in (("lengths", ()), ("dtype", "int8")):
        broken = replace(made, plan=replace(made.plan))
        object.__setattr__(broken.plan, "problem", replace(made.plan.problem, **{name: size}))
        with pytest.raises(ValueError, match=rf"^(plan's {name}|sums\[0\]) "):
            broken.save(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# Plans that are written down, of which an exported program holds some.


def plans() -> list[Plan]:
    """One of every kind."""
    query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 60, 8))
    keys[0][:, 4:] *= 1e-3
    pruned = tattn.plan(query, keys, method="polynomial", gradients=False)
    assert pruned.grading and pruned.sizes
    return [
        pruned,
        tattn.plan(query, keys, degree=2),
        tattn.plan(query, keys, degree=2, series="taylor"),
        tattn.plan(query, keys, degree=2, bound="estimated"),
        tattn.plan(query, keys, series="banded"),
        tattn.plan(query, keys, method="exact"),
        tattn.plan(query, keys, window=(3, 4)),
        tattn.plan_for(n=10**6, dim=4, bound=1.0, causal=True, workers=7, bandwidth=1e9, flops=1e12),
        tattn.plan_for(n=10**18, dim=9, bound=1e-3, order=64, degree=1, dtype="bfloat16"),
    ]


def test_plans_are_read_as_they_were_written() -> None:
    for plan in plans():
        assert plan_of_facts(json.loads(plan_text(plan))) == plan


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "bogus"),
        ("series", "exact"),
        ("source", "rumour"),
        ("dtype", "int8"),
        ("degree", 3),
        ("rank", 44),
        ("dim", 7),
        ("order", 1),
        ("order", 4),
        ("coefficients", [1.0, 1.0]),
        ("coefficients", [1.0, nan, 0.5]),
        ("grading", [1] * 7),
        ("grading", [1] * 7 + [2]),
        ("scale", 0.0),
        ("bound", -1.0),
        ("error", nan),
        ("certified", 1),
        ("lengths", [60, 60]),
        ("bands", 2),
        ("window", [3, 4]),
        ("reason", None),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_by_name(name: str, value: Any) -> None:
    told = {**json.loads(plan_text(plans()[1])), name: value}
    with pytest.raises(ValueError, match=rf"^plan's (rank|lengths|coefficients|{name}) should be"):
        plan_of_facts(told)
    with pytest.raises(ValueError, match=r"^a plan has no 'colour'$"):
        plan_of_facts({**told, "colour": 1})
    with pytest.raises(ValueError, match=r"^a plan should be facts by name, got list$"):
        plan_of_facts([1])
