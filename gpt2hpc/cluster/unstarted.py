"""Jobs of a template that have never started: Slurm alone knows them, and not of which run they are.

`sbatch slurm/train_124m.sbatch` names its run by a variable, which Slurm does not show; the script's first start notes the job in that
run. So all that can be said before is that there are such jobs.
"""

from __future__ import annotations

import re

from gpt2hpc.cluster import queries

MARK, SUBMITTED_BY_US = "# >>> gpt2hpc set-up >>>", "submitit.core._submit"
RESUBMITTED = re.compile(r"/slurm/job\.sh( |$)")
"""Of the command of a job that `resume.sh` submits, whose script's path ends so; such a job is noted in its run."""
MAX_ASKED = 20
"""Of waiting jobs, each of which takes two questions."""


def of_templates() -> list[queries.Pending]:
    """This user's waiting jobs that were submitted by hand from one of our templates and have not begun yet."""
    return [each for each in queries.own_pending()[:MAX_ASKED] if _is_unstarted(each)]


def hint() -> str:
    """What to say, behind other words, where a run or a job of it is not known; empty where there is no such job."""
    found = of_templates()
    named = ", ".join(f"{each.number} ({each.name})" for each in found)
    numbers = [each.number for each in found]
    told = f"a job of sbatch is known to its run from its first start on, and {named} waits for that still"
    asked = f"`squeue -j {','.join(numbers)}` shows why, `scancel {' '.join(numbers)}` ends that"
    return f"; {told}: {asked}" if found else ""


def _is_unstarted(pending: queries.Pending) -> bool:
    if RESUBMITTED.search(pending.command):
        return False
    script = queries.batch_script(pending.number)
    is_ours = MARK in script and SUBMITTED_BY_US not in script  # those are noted in their run by `gpt2hpc submit`
    return is_ours and (queries.job(pending.number) or {}).get("Restarts") == "0"
