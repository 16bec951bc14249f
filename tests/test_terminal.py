"""Command lines on terminals that show little, at pipes that close and on disks that are full."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tattn.__main__ import main
from tattn.terminal import command, writable_file, writable_folder

PLAN = ["plan", "--n", "1000", "--dim", "4", "--bound", "1"]
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def run(*arguments: str, shell: str = '"$@"', **variables: str) -> tuple[int, str, str]:
    """Status, output and errors of the command line, as "$@" of a shell command."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG")) and k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, "-m", "tattn", *arguments],
        capture_output=True, text=True, encoding="utf-8", errors="replace", env={**inherited, **variables},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C"},
    ],
)
def test_what_a_terminal_cannot_show_is_a_question_mark(variables: dict[str, str]) -> None:
    status, out, errors = run("plan", "--help", **variables)
    assert (status, errors) == (0, "")
    assert "_c |q_c a_c b_c|" in out


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("arguments", [PLAN, [*PLAN, "--json"], ["--help"], ["--version"]])
def test_a_pipe_that_closes_ends_it_without_a_word(arguments: list[str]) -> None:
    assert run(*arguments, shell='"$@" | true; exit ${PIPESTATUS[0]}') == (1, "", "")


@needs_full
@pytest.mark.parametrize("arguments", [PLAN, ["plan", "--help"]])
def test_a_full_disk_is_said_in_one_line(arguments: list[str]) -> None:
    message = "python -m tattn: [Errno 28] No space left on device\n"
    assert run(*arguments, shell='"$@" > /dev/full') == (1, "", message)


@needs_full
def test_nowhere_to_say_anything() -> None:
    assert run(*PLAN, shell='"$@" > /dev/full 2> /dev/full') == (1, "", "")
    assert run(*PLAN, shell='"$@" >&-') == (0, "", "")
    assert run(*PLAN, "--tol", "-1", shell='"$@" >&- 2>&-')[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--degree", "200000"], "degree should be at most 100, got 200000"),
        (["--n", f"1{'0' * 120}"], "n should be at most 9,223,372,036,854,775,807, got about 10^120"),
        (["--order", "400"], "order should be at most 64, got 400"),
        (["--dtype", "int8"], "dtype should be 'float64', 'float32', 'float16' or 'bfloat16', got 'int8'"),
    ],
)
def test_refusals_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *options]) == 2
    assert capsys.readouterr() == ("", f"python -m tattn: {message}\n")


def test_the_stream_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    @command("name")
    def shows(text: str) -> int:
        print(text)
        return 0

    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert shows("Σ") == 0
    assert raw.getvalue() == b"?\n"
    assert stream.errors == "strict"
    monkeypatch.setattr(sys, "stdout", None)
    assert shows("Σ") == 0


def test_errors_of_the_work_are_told_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    @command("name")
    def fails(error: Exception) -> int:
        raise error

    for error, status in ((ValueError("what"), 2), (ModuleNotFoundError("what"), 2), (FileNotFoundError("what"), 1)):
        assert fails(error) == status
        assert capsys.readouterr() == ("", "name: what\n")
    # What nobody foresaw keeps its traceback.
    with pytest.raises(AssertionError):
        fails(AssertionError())


def test_places_to_write_to(tmp_path: Path) -> None:
    assert writable_folder("out", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert writable_file("plot", str(tmp_path / "file.png")) == tmp_path / "file.png"
    (tmp_path / "file").write_text("as it was")
    assert writable_file("plot", tmp_path / "file") == tmp_path / "file"
    assert (tmp_path / "file").read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "file"]
    with pytest.raises(ValueError, match=r"^out should be a folder that can be written to, got .*file': File exists$"):
        writable_folder("out", tmp_path / "file")
    with pytest.raises(ValueError, match=r"^out should be a folder .*x': Not a directory$"):
        writable_folder("out", tmp_path / "file" / "x")
    with pytest.raises(ValueError, match=r"^plot should be a file that can be written, got .*x': Not a directory$"):
        writable_file("plot", tmp_path / "file" / "x")
    with pytest.raises(ValueError, match=r"^plot should be a file .*x': No such file or directory$"):
        writable_file("plot", tmp_path / "nowhere" / "x")
    with pytest.raises(ValueError, match=r"^plot should be a file .*a': Is a directory$"):
        writable_file("plot", tmp_path / "a")
