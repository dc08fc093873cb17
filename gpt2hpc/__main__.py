"""`gpt2hpc VERB …` and `python -m gpt2hpc VERB …`: find the verb's module and run it.

A verb is imported only when it is called: `submit` and `status` start without torch, and none pays for another.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from gpt2hpc import __version__, cli
from gpt2hpc.errors import UsageError

VERBS = {
    "init": "a site profile, guessed by asking this cluster",
    "stage": "fetch what compute nodes without internet will need",
    "prepare": "tokenize text into shards",
    "verify": "hash shards or staged files and compare",
    "push-data": "upload prepared data to the Hub",
    "plan": "hours, GPU-hours, jobs and disk of a run, for a proposal",
    "submit": "train or prepare as jobs: restarted, resumed, supervised",
    "train": "train here and now, one process per GPU",
    "sync": "upload checkpoints that wait to the Hub, or fetch the furthest",
    "status": "how far runs are, why one waits or has ended; --watch",
    "logs": "what a run's jobs have printed; -f follows it through requeues",
    "stop": "let a run save and end; `resume` goes on",
    "cancel": "end a run at once: its last checkpoint stays",
    "resume": "go on with a run that has ended or is held",
    "plot": "loss curves of one or many runs as an image",
    "report": "one HTML file that tells of a run, or compares several",
    "doctor": "is there what a training will need?",
    "image": "build a container image, or check one",
    "selftest": "does this installation, or image, work here? It tries",
    "evaluate": "HellaSwag and validation loss, beside published numbers",
    "sample": "write text with a trained model",
    "export": "a checkpoint as a model of transformers, and to the Hub",
}


EXAMPLES = (
    "gpt2hpc init                            # on a cluster's login node: a site profile",
    "gpt2hpc prepare --source my_texts/ --out data/mine",
    "gpt2hpc submit --preset gpt2-124m --data.dir data/mine --run-dir runs/mine --dry-run",
    "gpt2hpc status runs",
    'gpt2hpc sample runs/mine --prompt "Once upon a time"',
)


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        cli.say(usage())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        cli.say(f"gpt2hpc {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown command {verb}; {hint}the commands are {', '.join(VERBS)}")
    module = importlib.import_module(f"gpt2hpc.{verb.replace('-', '_')}")
    code: int = module.main(rest)
    return code


def usage() -> str:
    lines = [f"  {verb:9} {purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(
        [
            f"gpt2hpc {__version__}: from raw text to a trained GPT-2, through any number of preemptions.",
            "",
            "usage: gpt2hpc COMMAND …        gpt2hpc COMMAND --help",
            "",
            *lines,
            "",
            cli.EXAMPLES,
            *(f"  {command}" for command in EXAMPLES),
        ]
    )


def console() -> int:
    """The console script."""
    return cli.run(main)


if __name__ == "__main__":
    sys.exit(console())
