"""What keeps an unpacked image on a node: the shell of `shell/unpack.sh`, with a small program in place of Apptainer's `build`."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from pathlib import Path

import pytest

from gpt2hpc.cluster import script

SHELL = Path(script.__file__).parent / "shell" / "unpack.sh"
DAY_S = 24 * 3600.0
pytestmark = pytest.mark.skipif(
    subprocess.run(["stat", "-f", "-c", "%T", "/tmp"], capture_output=True, text=True).stdout == "tmpfs\n",
    reason="/tmp is memory here, where nothing is unpacked",
)


def unpack(folder: Path, name: str, *, builds: bool = True) -> int:
    """Its exit code; the program that builds makes a directory, or fails half-way."""
    program = folder.parent / f"builds-{builds}"
    program.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3" = "--quiet build --sandbox" ] && mkdir "$4" && {str(builds).lower()}\n'
    )
    program.chmod(0o755)
    text = f'. {SHELL}; bash -c "$unpack" unpack "$@"'
    words = [str(folder), name, str(program), "kit.sif"]
    return subprocess.run(["bash", "-c", text, "sh", *words], capture_output=True, check=False).returncode


def test_once_for_all_jobs_and_for_its_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    assert unpack(folder, "one") == 0
    assert folder.stat().st_mode & 0o077 == 0
    made = (folder / "one" / "image").stat().st_ino
    assert unpack(folder, "one", builds=False) == 0, "it is there already"
    assert (folder / "one" / "image").stat().st_ino == made


def test_half_an_image_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    assert unpack(folder, "one", builds=False) != 0
    assert (folder / "one" / "image").exists()
    assert not (folder / "one.whole").exists()
    assert unpack(folder, "one") == 0
    assert (folder / "one.whole").exists()


def test_a_directory_of_others_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    assert unpack(folder, "one") != 0
    folder.unlink()
    if os.geteuid() == 0:
        folder.mkdir()
        os.chown(folder, 65534, 65534)
        assert unpack(folder, "one") != 0
    assert list(elsewhere.iterdir()) == []


def test_what_nobody_began_with_for_a_month_goes_unless_it_is_being_made(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("old", "young"):
        assert unpack(folder, name) == 0
    (folder / "busy").mkdir()
    past = time.time() - 40 * DAY_S
    os.utime(folder / "old.whole", (past, past))
    with (folder / "busy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert unpack(folder, "new") == 0
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"young", "busy", "new"}
