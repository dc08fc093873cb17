"""The shell around the ranks: what a batch script does before srun and after it.

The blocks below are in every script that gpt2hpc submits and, word for word, in each template of `slurm/`;
`python -m gpt2hpc.cluster.script slurm/*.sbatch` puts them there after a change here. They need bash, coreutils and
Slurm's own commands on the host, and nothing else: Python may live in a container image.

A block reads these variables: RUN_DIR; IMAGE, RUNTIME, BINDS, PYTHON (how Python is run); MASTER_ADDR_SUFFIX.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import cli, durable
from gpt2hpc.errors import ConfigError, UsageError

SRUN_ARGS = ("--kill-on-bad-exit=1", "--wait=300", "--export=ALL", "--open-mode=append")
"""Without the first, survivors of a dead rank run on; without --export, `sbatch --export=NONE` hides MASTER_ADDR from the ranks;
without the last, a restart truncates the log. --wait ends ranks that hang after another has ended."""

SET_UP = r"""
set +e # whatever ends the ranks, this shell must live to say what comes next
trap : TERM USR1 USR2
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # a bare id may mean the whole array
job=${job:-$SLURM_JOB_ID}
fact() { scontrol show job -o "$job" | sed -n "s/.* $1=\([^ ]*\).*/\1/p" | grep -vx '(null)'; }
mkdir -p "$RUN_DIR" || exit 9
RUN_DIR=$(realpath "$RUN_DIR")

# How Python is run here: in the image, if there is one.
if [ -n "${IMAGE:-}" ]; then
    unset PYTHONPATH PYTHONHOME # the host's would leak into the container
    run=("${RUNTIME:-apptainer}" --quiet exec --no-eval --pwd "$PWD" --bind "$PWD" --bind "$RUN_DIR")
    [ -z "${BINDS:-}" ] || run+=(--bind "$BINDS")
    [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || run+=(--nv)
    run+=("$IMAGE" python3)
else
    run=("${PYTHON:-python3}")
fi

# When the job will be killed: the ranks save before, with or without a signal.
if end=$(date -d "$(fact EndTime)" +%s 2>/dev/null); then export GPT2HPC_JOB_END=$end; else unset GPT2HPC_JOB_END; fi

# Where the ranks meet: rank 0's node, at a port below those that the kernel hands out and that nothing there uses.
MASTER_ADDR=127.0.0.1
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(getent ahostsv4 "$head${MASTER_ADDR_SUFFIX:-}" | awk 'NR == 1 { print $1 }')
    case $MASTER_ADDR in
    127.*) MASTER_ADDR=$(hostname -I | awk '{ print $1 }') ;; # a node's name for itself, no use to the others
    '') MASTER_ADDR=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') ;; # only Slurm knows the name
    esac
    MASTER_ADDR=${MASTER_ADDR:-$head}
fi
MASTER_PORT=$((10000 + (SLURM_JOB_ID + 997 * ${SLURM_RESTART_COUNT:-0}) % 20000))
while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT

export GPT2HPC_SRUN=1                                          # a task of srun is a rank
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} # another number would change the last bits
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun does not inherit it
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 # keep the memory of the logits between steps
scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/gpt2hpc-${USER:-user}-$SLURM_JOB_ID # compilers' caches break on a shared disk
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
"""

TEAR_DOWN = r"""
rc=$?
decide() { scontrol show job -o "$job" | "${run[@]}" -m gpt2hpc.cluster.requeue decide "$RUN_DIR" --exit-code "$rc" "$@"; }
read -r action code delay_s allow exclude reason < <(decide)
echo "gpt2hpc: job $job: ${action:-cannot decide what comes next}: ${reason:-see above; the ranks ended with code $rc}"
if [ "$action" = requeue ] && [ "$(fact JobState)" = RUNNING ]; then # still: it may have been cancelled meanwhile
    [ "$allow" = 0 ] || scontrol update "JobId=$job" Requeue=1
    if scontrol requeue "$job"; then # what follows works only after it, and it ends this shell soon
        [ "$exclude" = - ] || scontrol update "JobId=$job" "ExcNodeList=$exclude"
        [ "$delay_s" = 0 ] || scontrol update "JobId=$job" "StartTime=now+$delay_s"
        exit "$code"
    fi
    read -r action code delay_s allow exclude reason < <(decide --refused)
fi
if [ "$action" = resubmit ]; then # the same job under another number
    script=$RUN_DIR/slurm/resubmitted-$job.sh
    options=("--begin=now+$delay_s" "--job-name=$SLURM_JOB_NAME" "--nodes=$SLURM_JOB_NUM_NODES" "--partition=$SLURM_JOB_PARTITION")
    [ "$exclude" != - ] || exclude=$(fact ExcNodeList)
    for option in "time=$(fact TimeLimit)" "account=$(fact Account)" "qos=$(fact QOS)" "constraint=$(fact Features)" \
        "nodelist=$(fact ReqNodeList)" "exclude=$exclude" "ntasks-per-node=${SLURM_NTASKS_PER_NODE:-}" \
        "cpus-per-task=${SLURM_CPUS_PER_TASK:-}" "gpus-per-node=${SLURM_GPUS_PER_NODE:-}"; do
        [ -z "${option#*=}" ] || options+=("--$option")
    done
    if mkdir -p "${script%/*}" && scontrol write batch_script "$SLURM_JOB_ID" "$script" &&
        successor=$(sbatch --parsable "${options[@]}" "$script" "$@"); then
        echo "gpt2hpc: job $job goes on as job $successor"
        [ -z "${PICKLES:-}" ] || cp "$PICKLES/${job}_submitted.pkl" "$PICKLES/${successor}_submitted.pkl"
    fi
fi
if [ -z "$action" ]; then code=$((rc == 0 ? 1 : rc)); fi
[ "$code" -le 9 ] || code=1 # other codes mean something to Slurm, to shells or to submitit
exit "$code"
"""

BLOCKS = {"set-up": SET_UP, "tear-down": TEAR_DOWN, "srun": f"srun_args=({' '.join(SRUN_ARGS)})\n"}


def lines(block: str) -> list[str]:
    """A block between the marks by which it is found again."""
    return [f"# >>> gpt2hpc {block} >>>", *BLOCKS[block].strip("\n").split("\n"), f"# <<< gpt2hpc {block} <<<"]


def refreshed(text: str, path: Path) -> str:
    """A template with the blocks of today; ConfigError where one is missing."""
    for block in BLOCKS:
        marked = re.compile(rf"^# >>> gpt2hpc {block} >>>$.*?^# <<< gpt2hpc {block} <<<$", re.DOTALL | re.MULTILINE)
        if len(marked.findall(text)) != 1:
            raise ConfigError(
                f"{path} needs one block between `# >>> gpt2hpc {block} >>>` and `# <<< gpt2hpc {block} <<<`"
            )
        new = "\n".join(lines(block))
        text = marked.sub(lambda match: new, text)  # noqa: B023 -- used at once
    return text


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        raise UsageError("give the templates whose blocks are to be brought up to date, as slurm/*.sbatch")
    for path in map(Path, argv):
        durable.publish_text(path, refreshed(path.read_text(encoding="utf-8"), path))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
