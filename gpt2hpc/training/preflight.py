"""Are the nodes fit for the job? Asked by all ranks together, in seconds, before the training costs hours.

A fault of a node's is a crash: the node is noted as a suspect, and the job starts again, without it where others are left. A fault
of the user's ends the job with the mend. No random number is drawn, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2hpc import cli, durable
from gpt2hpc.cluster import submitter
from gpt2hpc.cluster.dist_env import LOCAL, MIN_ALLREDUCE
from gpt2hpc.cluster.ledger import Attempt, Ledger
from gpt2hpc.config import Config
from gpt2hpc.data import hub
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.errors import ConfigError, MissingError, NodeError, RunDirError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import bandwidth, checkpoint, rank_facts
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.rank_facts import Fault, RankFacts

UNSEEN_S = 60.0
"""For which a client of NFS may not see a new name: acdirmax of nfs(5)."""


@dataclass(frozen=True)
class Preflight:
    """One of an attempt, on one rank.

    Args:
        run: The run directory.
        config: Settings of the run.
        manifest: The data.
        ranks: This process among its peers.
        nodes: The node of each rank.
        environ: The process's environment.
        beat: Called as it gets on, where that may take long.
    """

    run: RunDir
    config: Config
    manifest: Manifest
    ranks: Ranks
    nodes: Sequence[str]
    environ: Mapping[str, str]
    beat: Callable[[], object] = lambda: None

    def level(self, attempt: Attempt) -> Literal["full", "thin", "off"]:
        """What is done, by all ranks: auto is full in a batch job, thin here. Of such a job not every rank of torchrun may know."""
        wish = self.config.train.preflight
        if wish != "auto":
            return wish
        return "thin" if attempt.job.startswith(LOCAL) else "full"

    def check(self, ledger: Ledger, attempt: Attempt) -> None:
        """Raise, on every rank, NodeError with the suspects noted, or an error of the user's. Collective."""
        if self.level(attempt) == "off":
            return
        began = time.monotonic()
        facts = self._ask(attempt, ledger)
        rate = self._all_reduce(attempt, ledger)
        if self.ranks.is_first:
            for remark in rank_facts.remarks(facts):
                cli.warn(remark)
            cli.note(self._line(facts, rate, time.monotonic() - began))

    # What ranks see ---------------------------------------------------------------------------------------------

    def _ask(self, attempt: Attempt, ledger: Ledger) -> list[RankFacts]:
        """Every rank's facts, judged by rank 0."""
        ranks = self.ranks
        word = ranks.from_first(secrets.token_hex(8) if ranks.is_first else None)
        leads = self.nodes.index(ranks.env.node) == ranks.rank
        mine = self.run.preflight(attempt.number, ranks.env.node)
        failure = _written(mine, word) if leads else None
        ranks.barrier()  # all look at their clocks now
        local = None if hub.is_remote(self.manifest.where) else Path(self.manifest.where)
        told = ranks.gather((rank_facts.seen(ranks, self.run.path, local), failure))
        facts = [each for each, _ in told]
        try:
            with ranks.first_decides():
                if ranks.is_first:
                    failures = {each.node: text for each, text in told if text}
                    found = [
                        *self._submitter(attempt),
                        *rank_facts.faults(facts),
                        *self._disk(attempt, word, facts, failures),
                    ]
                    _refuse(self._tolerated(found, attempt), ledger, attempt)
                    self._check_space()
        finally:
            if leads:
                with contextlib.suppress(OSError):
                    mine.unlink()
        return facts

    def _check_space(self) -> None:
        """Before minutes are spent on loading; what a killed save has left is cleared away only then, and the space looked at again."""
        directory = self.run.checkpoints
        if not any(directory.glob("*.tmp")):
            checkpoint.check_space(
                directory,
                bytes_each=self.config.state_bytes,
                config=self.config.checkpoint,
                resumed=checkpoint.furthest(directory),
                decay_begins=self.config.decay_begins,
            )

    def _submitter(self, attempt: Attempt) -> Iterator[Fault]:
        """A run that has begun goes on with a newer gpt2hpc, as with any restart."""
        text = submitter.other_version(self.environ)
        if text and attempt.restart == 0 and not self.run.has_checkpoints:
            yield Fault(text, kind=MissingError)
        elif text:
            cli.warn(text)

    def _tolerated(self, faults: Sequence[Fault], attempt: Attempt) -> list[Fault]:
        """All of them; in a thin preflight those of nodes are but warned of: there is no other node to go to."""
        if self.level(attempt) == "full":
            return list(faults)
        for fault in faults:
            if fault.nodes:
                cli.warn(fault.text)
        return [fault for fault in faults if not fault.nodes]

    def _disk(
        self, attempt: Attempt, word: str, facts: Sequence[RankFacts], failures: Mapping[str, OSError]
    ) -> Iterator[Fault]:
        """Does rank 0 read what every node has written?"""
        full = [error for error in failures.values() if error.errno in (errno.ENOSPC, errno.EDQUOT)]
        if full:
            yield Fault(
                f"--run-dir={self.run.path}: {full[0].strerror}; free space, or choose another", kind=RunDirError
            )
            return
        bad = {node: f"{error.strerror}" for node, error in failures.items()}
        for node in dict.fromkeys(self.nodes):
            if node not in bad and _read(self.run.preflight(attempt.number, node)) != word:
                bad[node] = "what it writes there is not seen elsewhere"
        if bad:
            why = "; ".join(f"{node}: {reason}" for node, reason in bad.items())
            text = f"--run-dir={self.run.path} is not shared by all nodes ({why})"
            user = Fault(f"{text}; choose a directory on a file system that all of them mount", kind=RunDirError)
            yield rank_facts.blamed(list(bad), facts, text, user, lambda each: each.run_mount)

    # How fast they talk -----------------------------------------------------------------------------------------

    @property
    def floor(self) -> tuple[float, str] | None:
        """GB/s, and who says so. The site's is one of its network; ConfigError where that is no number."""
        wish = self.config.train.min_allreduce_gb_s
        if wish is not None:
            return wish, f"train.min_allreduce_gb_s={wish:g}"
        text = self.environ.get(MIN_ALLREDUCE, "").strip()
        if not text:
            return None
        try:
            of_site = float(text), f"{MIN_ALLREDUCE}={text}"
        except ValueError:
            raise ConfigError(
                f"{MIN_ALLREDUCE}={text} in the environment must be a number of GB/s; unset it or mend it"
            ) from None
        return of_site if len(set(self.nodes)) > 1 and self.ranks.device.type == "cuda" else None

    def _all_reduce(self, attempt: Attempt, ledger: Ledger) -> float | None:
        """Bus bandwidth in GB/s; None where it is not measured."""
        ranks = self.ranks
        with ranks.first_decides():
            floor = self.floor if ranks.is_first else None
        floor = ranks.from_first(floor)
        if ranks.world_size == 1 or (self.level(attempt) == "thin" and self.config.train.min_allreduce_gb_s is None):
            return None
        rate = bandwidth.all_reduce_gb_s(ranks)
        if floor is not None and rate < floor[0]:
            pairs = bandwidth.pair_gb_s(ranks, self.nodes, self.beat)
            with ranks.first_decides():
                if ranks.is_first:
                    text = f"all-reduce of {rate:.3g} GB/s is below {floor[1]}"
                    _refuse([too_slow(text, pairs, list(dict.fromkeys(self.nodes)))], ledger, attempt)
        return rate

    def _line(self, facts: Sequence[RankFacts], rate: float | None, seconds: float) -> str:
        nodes = len(set(self.nodes))
        each = cli.plural(-(-len(facts) // nodes), "rank")
        gpu = facts[0].gpu
        of_node = f"{-(-len(facts) // nodes)} {gpu.kind}" if gpu else f"{each} on {self.ranks.device.type}"
        parts = [f"{cli.plural(nodes, 'node')} × {of_node}"]
        if rate is not None:
            parts.append(f"all-reduce {rate:.3g} GB/s")
        parts.append("run directory writable from all" if nodes > 1 else "run directory writable")
        return f"preflight: {', '.join(parts)}, {seconds:.1f} s"


def too_slow(text: str, pairs: bandwidth.Pairs, nodes: Sequence[str]) -> Fault:
    """Who is to blame, of those `nodes`."""
    slow = bandwidth.standing_out(pairs)
    rates = ", ".join(f"{a}–{b} {rate:.3g}" for (a, b), rate in sorted(pairs.items(), key=lambda item: item[1])[:4])
    told = f"; the slowest in GB/s: {rates}"
    if slow.nodes or slow.pairs:
        both = sorted({node for pair in slow.pairs for node in pair})
        named = [*slow.nodes, *(f"{a} with {b}" for a, b in slow.pairs)]
        return Fault(f"{text}; slow: {', '.join(named)}{told}", (*slow.nodes, *both))
    if len(nodes) < 3:  # none to compare them with
        return Fault(f"{text} on {' and '.join(nodes)}{told}", tuple(nodes))
    return Fault(
        f"{text}, and no node stands out{told}; lower the floor, or look at the network's settings (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)",
        kind=ConfigError,
    )


def _refuse(faults: Sequence[Fault], ledger: Ledger, attempt: Attempt) -> None:
    """Raise what is wrong, if anything: an error of the user's first, which no other node mends."""
    for fault in faults:
        if not fault.nodes:
            raise fault.kind(f"preflight: {fault.text}")
    if faults:
        suspects = tuple(sorted({node for fault in faults for node in fault.nodes}))
        ledger.note(attempt, suspects=suspects)
        raise NodeError(f"preflight: {'; '.join(fault.text for fault in faults)}")


def _written(path: Path, word: str) -> OSError | None:
    """Write and fsync; what went wrong, if anything. A client of NFS may take a new directory for missing for a while."""
    patient_until = time.monotonic() + UNSEEN_S
    while True:
        try:
            durable.write_bytes(path, word.encode())
            durable.fsync_dir(path.parent)
        except OSError as error:
            if error.errno == errno.ENOENT and time.monotonic() < patient_until:
                time.sleep(1)
                continue
            return OSError(error.errno, error.strerror or os.strerror(error.errno or 0))
        return None


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    return None
