"""The machine that tests run on: its commands, its unprivileged user, and things that are made once."""

from __future__ import annotations

import contextlib
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

USER = "gpt2hpc-test"


def run(command: Sequence[str | Path], **options: Any) -> str:
    """Standard output of the command; what it printed is shown where it fails."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, text=True, capture_output=True, check=False, **options
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{said}")
    return done.stdout


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Says what takes long, and how long."""
    started = time.monotonic()
    print(f"\n{name} ...", end="", flush=True)
    yield
    print(f" {time.monotonic() - started:.0f} s", flush=True)


def once(final: Path, fill: Callable[[Path, Path], None]) -> Path:
    """The folder `final`, made by `fill(folder, final)` beside it and then renamed: it is whole or absent."""
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f"{final.name}-new-"))
    try:
        beside.chmod(0o755)
        fill(beside, final)
        with contextlib.suppress(FileExistsError):  # somebody else was faster
            beside.rename(final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def user() -> pwd.struct_passwd:
    """The unprivileged user who builds and runs images; made where it is missing."""
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        run(["useradd", "--create-home", "--shell", "/bin/sh", USER])
        return pwd.getpwnam(USER)


def as_user(*command: str | Path) -> tuple[str | Path, ...]:
    """The command, run by the unprivileged user; the process stays the same one, so that it can be signalled."""
    who = user()
    return "setpriv", f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--init-groups", *command


@contextlib.contextmanager
def no_network() -> Iterator[tuple[str, ...]]:
    """Begins a command of root's that has no interface but the loopback, the same one for all of them."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n"
    try:
        yield "nsenter", f"--net=/proc/{holder.pid}/ns/net"
    finally:
        holder.communicate()  # closes its input, and cat ends


def user_environment() -> dict[str, str]:
    """All the environment that the unprivileged user gets: none of the caller's."""
    who = user()
    return {"HOME": who.pw_dir, "USER": USER, "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
