from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc import cli, config_io
from gpt2hpc.__main__ import VERBS, main, usage
from gpt2hpc.errors import EXIT_CODES, USER_ERRORS, DataError, StoppedError, UsageError, error_for
from tests.tiny import gpt2hpc

ROOT = Path(__file__).parents[2]


def test_exit_codes_are_distinct_and_safe() -> None:
    codes = [error.exit_code for error in USER_ERRORS]
    assert len(set(codes)) == len(codes)
    assert not {85, 144, 255, 0, 1} & set(codes)
    assert all(code < 128 for code in codes)


def test_exit_codes_are_documented() -> None:
    documented = (ROOT / "docs" / "exit-codes.md").read_text()
    for line in cli.exit_code_table().splitlines():
        assert line in documented
    assert len(re.findall(r"^\| \d+ \|", documented, re.MULTILINE)) == len(EXIT_CODES)


def test_an_error_of_the_users_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def verb(argv: object) -> int:
        raise DataError("a\nb=3 is wrong; try 4")

    assert cli.run(verb, []) == DataError.exit_code
    assert capsys.readouterr().err == "gpt2hpc: error: a b=3 is wrong; try 4\n"


def test_a_full_disk_is_the_users_and_other_os_errors_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    def full(argv: object) -> int:
        with Path("/dev/full").open("w") as file:
            file.write("x")
        return 0

    def absent(argv: object) -> int:
        return len(Path("/nowhere/at/all").read_text())

    assert cli.run(full, []) == 9
    assert "No space left on device; free space" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        cli.run(absent, [])


def test_nobody_reads_any_more(tmp_path: Path) -> None:
    """`gpt2hpc … | head`: what is said goes nowhere, and the work goes on."""
    program = (
        "import sys; from pathlib import Path; from gpt2hpc import cli\n"
        "def main(argv):\n"
        "    for number in range(20000): cli.say(f'line {number}')\n"
        f"    Path({str(tmp_path / 'done')!r}).write_text('x')\n"
        "    return 0\n"
        "sys.exit(cli.run(main, []))\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$0" | head -1; exit ${{PIPESTATUS[0]}}', program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\n", "")
    assert (tmp_path / "done").exists()


def test_a_bug_keeps_its_traceback() -> None:
    def verb(argv: object) -> int:
        return [][1]

    with pytest.raises(IndexError):
        cli.run(verb, [])


def test_an_interrupt_is_a_stop() -> None:
    def verb(argv: object) -> int:
        raise KeyboardInterrupt

    assert cli.run(verb, []) == StoppedError.exit_code


def test_errors_cross_ranks_by_their_code() -> None:
    for kind in USER_ERRORS:
        assert type(error_for(kind.exit_code, "x")) is kind


def test_unknown_command() -> None:
    done = gpt2hpc("preprae")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean prepare?" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "run"], "--out is missing; see `gpt2hpc export --help`"),
        (["export", "run", "--out"], "--out takes one value; see"),
        (["export", "run", "--out=out", "--lisence=mit"], "unknown option --lisence; did you mean --license? see"),
        (["evaluate", "run", "--np", "2"], "unknown option --np; did you mean --nproc? see"),
        (["logs", "run", "other"], "other is one word too many; see"),
        (["logs", "-n", "few"], "--lines=few is not valid; it takes a whole number; see"),
        (
            ["image", "check", "a.sif", "--runtime=x"],
            "--runtime=x is not valid; it takes one of apptainer, singularity;",
        ),
        (["image", "look"], "build|check=look is not valid; it takes one of build, check; see"),
        (
            ["doctor", "--runtime=podman"],
            "--runtime=podman is none of apptainer, singularity, pyxis, docker, none; podman",
        ),
        (
            ["submit", "--runtime=podman", "--dry-run", "--cluster=slurm"],
            "docker, none; podman goes by the name docker",
        ),
        (
            ["submit", "pipeline", "--dry-run", "--prepare=--aray 3"],
            "--prepare: unknown option --aray; did you mean --array?",
        ),
        (["submit", "pipeline", "--dry-run", "--export=--push '"], "--export: No closing quotation"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.run(main, words) == UsageError.exit_code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("gpt2hpc: error: ")
    assert told.err.count("\n") == 1
    assert said in told.err


@pytest.mark.parametrize("words", ["report run", "plot run", "evaluate run", "init --force"])
def test_a_directory_is_no_file_to_write(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in ("there.png", "."):
        Path(out).mkdir(exist_ok=True)
        assert cli.run(main, [*words.split(), "--out", out]) == UsageError.exit_code
        told = capsys.readouterr().err
        assert told.startswith(f"gpt2hpc: error: --out={out} ")
        assert told.count("\n") == 1
        assert ("is a directory; name a file in it, as --out " in told) == ((words, out) != ("plot run", "."))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run", "there.png"]


def test_the_help_of_an_option_shows_no_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["submit", "--help"])
    shown = capsys.readouterr().out
    assert "--runtime {apptainer,singularity,pyxis,docker,none}" in shown
    assert "lambda" not in shown


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str) -> None:
    done = gpt2hpc(verb, "--help")
    assert done.returncode == 0
    assert f"gpt2hpc {verb}" in done.stdout


def test_version() -> None:
    assert re.fullmatch(r"gpt2hpc \d+\.\d+\.\d+\n", gpt2hpc("--version").stdout)


class TakenError(Exception):
    """A parser has taken its words."""


def stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parsed(*arguments: Any, **options: Any) -> Any:
        parse(*arguments, **options)
        raise TakenError

    return parsed


def examples(shown: str) -> list[list[str]]:
    """The words of each command at the end of a help."""
    assert shown.count(f"\n{cli.EXAMPLES}\n") == 1
    lines = shown.partition(f"\n{cli.EXAMPLES}\n")[2].splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def taken(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command up to where its own parser has taken the words; it says so where it does not."""
    with monkeypatch.context() as patched:
        of_settings = words[0] in ("submit", "train", "plan") and words[1] != "prepare"
        place, name = (config_io, "parse") if of_settings else (argparse.ArgumentParser, "parse_args")
        patched.setattr(place, name, stopping(getattr(place, name)))
        with pytest.raises(TakenError):
            main(words)


@pytest.mark.parametrize("verb", [*VERBS, "submit prepare", "submit pipeline", "image build", "image check"])
def test_help_ends_with_examples_that_its_own_parser_takes(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    commands = examples(capsys.readouterr().out)
    assert commands, "an example of each"
    for command in commands:
        assert command[: 1 + len(verb.split())] == ["gpt2hpc", *verb.split()]
        taken(command[1:], monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_an_example_that_no_parser_takes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--adapt"):
        taken(["verify", "data", "--adapt"], monkeypatch)
    with pytest.raises(UsageError, match="--node"):
        taken(["submit", "--node", "4"], monkeypatch)


def test_the_help_of_all_ends_with_examples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in examples(usage()):
        assert command[0] == "gpt2hpc"
        taken(command[1:], monkeypatch)


def speak(argv: Sequence[str]) -> int:
    """A verb that says things, leaves others to others, and breaks."""
    cli.say("one line")
    cli.warn("two\nlines")
    print("somebody else's")
    print("somebody else's", file=sys.stderr)
    raise RuntimeError("a bug")


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_no_line_is_written_without_its_end(options: list[str]) -> None:
    """`srun --label` would end it, and label the end as a line of its own. These sockets keep each write for itself."""
    writes: list[bytes] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [*options, "-c", "from tests.unit.test_cli import cli, speak; cli.run(speak, [])"]
    with ours, subprocess.Popen([sys.executable, *words], stdout=theirs, stderr=theirs, env=without_unbuffered()):
        theirs.close()
        while piece := ours.recv(1 << 16):
            writes.append(piece)
    assert b"".join(writes).startswith(b"one line\ngpt2hpc: warning: two\nlines\n")
    assert b"RuntimeError: a bug\n" in b"".join(writes)
    assert [piece for piece in writes if not piece.endswith(b"\n")] == []


def without_unbuffered() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("words", [["--help"], ["plot", "--help"]])
def test_what_a_terminal_has_no_sign_for_is_written_as_its_number(words: list[str]) -> None:
    """As with LANG=en_US, without UTF-8."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt2hpc", *words],
        env={**os.environ, "PYTHONIOENCODING": "iso8859-1"},
        capture_output=True,
        text=True,
        encoding="iso8859-1",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\\u2[0-9a-f]{3}", done.stdout)
