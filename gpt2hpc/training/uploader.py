"""Uploads beside the training: a process of its own, so that hashing, a slow network and a dying client cost no step.

What it does is `gpt2hpc sync RUN`; all that it knows is on disk. It is in a session of its own, so a terminal's Ctrl-C and a signal to
the ranks leave it alone: it ends when nothing waits, when the training ends, or with Slurm's step. After a local crash of the training
it ends its work, which does no harm: it uploads only what is published.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import uploads

NICENESS = 10
POLL_S, END_S = 0.2, 5.0

Say = Callable[[str], None]


class Uploader:
    """Keeps the Hub behind the run directory by as little as it can, from rank 0.

    Args:
        run: Whose checkpoints are uploaded.
        repo: Where to, as the run's config.yaml says too.
        say: Prints a line.
    """

    def __init__(self, run: RunDir, repo: str, say: Say) -> None:
        self._run, self._repo, self._say = run, repo, say
        self._process: subprocess.Popen[bytes] | None = None
        self._fails = False

    def published(self) -> None:
        """Upload what waits, if that is not being done. Never waits, and never raises: an upload is no reason to end a training."""
        try:
            self._look()
            if self._process is None and uploads.waiting(self._run, self._repo):
                self._start()
        except OSError as error:
            self._report(f"no process for it: {error}")

    def close(self, wait_s: float, is_told_to_end: Callable[[], bool] = lambda: False) -> None:
        """At the end of training: upload the rest for at most `wait_s` seconds, then say what waits still. Never raises."""
        deadline = time.monotonic() + wait_s
        try:
            if wait_s and uploads.waiting(self._run, self._repo):
                self._say(
                    f"uploading to hf://{self._repo} what waits, for up to {wait_s:.0f} s; Ctrl-C or a signal ends it"
                )
            if self._process is not None:  # it may have looked before the last one was published
                self._wait(deadline, is_told_to_end)
            if wait_s and not is_told_to_end():
                self.published()
                self._wait(deadline, is_told_to_end)
            if self._process is not None:
                self._end()
            left = uploads.waiting(self._run, self._repo)
        except OSError as error:
            self._say(f"warning: what waits to be uploaded is not known: {error}")
            return
        if left:
            steps = ", ".join(str(found.step) for found in left)
            self._say(
                f"warning: not on hf://{self._repo} yet: step {steps}; `gpt2hpc sync {self._run.path}` uploads what waits"
            )

    def _start(self) -> None:
        self._run.uploads.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "gpt2hpc.sync", str(self._run.path)]
        with (self._run.uploads / uploads.LOG).open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)  # before it has threads, which inherit it

    def _look(self) -> None:
        """See whether it has ended, and how."""
        if self._process is None or (code := self._process.poll()) is None:
            return
        self._process = None
        failed = uploads.failure(self._run)
        if code > 0:  # below 0 by a signal: what was left waits for the next
            self._report(failed.reason if failed else f"exit code {code}; see {self._run.uploads / uploads.LOG}")
        elif self._fails:
            self._fails = False
            self._say("checkpoints are uploaded again")

    def _report(self, reason: str) -> None:
        """Warn when it begins to fail, not each time."""
        if not self._fails:
            self._fails = True
            self._say(
                f"warning: checkpoints are not uploaded: {reason}; they wait, and training goes on; "
                f"`gpt2hpc sync {self._run.path}` uploads them from where there is a network"
            )

    def _wait(self, deadline: float, is_told_to_end: Callable[[], bool]) -> None:
        while self._process is not None and time.monotonic() < deadline and not is_told_to_end():
            try:
                self._process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
            self._look()

    def _end(self) -> None:
        """Of a process that is out of time; what it has not uploaded goes on waiting."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
