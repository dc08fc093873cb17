"""The shell around ranks and tasks: what a batch script does before srun and after it.

The blocks below are in every script that gpt2hpc submits and, word for word, in each template of `slurm/`;
`python -m gpt2hpc.cluster.script slurm/*.sbatch` puts them there after a change here. On the host they need bash, the usual
small programs (sed, grep, awk, getent, date) and Slurm's own, but no Python: that may live in a container image.

They read these variables: RUN_DIR, DATA (to train), OUT, SOURCE (to prepare), MODEL, HELLASWAG, DATA, OUT (to evaluate);
IMAGE, RUNTIME, BINDS, CONTAINER_ENV, PYTHON (how Python is run); GUARD;
MASTER_ADDR_SUFFIX; PICKLES (submitit's).
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

_JOB = r"""
set +e # whatever ends the ranks, this shell must live to say what comes next
trap : TERM USR1 USR2
unset RANK LOCAL_RANK WORLD_SIZE # the ranks' own come from srun

# A job, as Slurm knows it; a controller that is busy is asked again. What follows Command= is the user's words.
show() {
    for _ in 1 2 3 4 5 6; do
        SLURM_TIME_FORMAT=standard scontrol show job -o "$1" && return
        if scontrol show job -o "$1" 2>&1 | grep -q 'Invalid job id'; then break; fi # it has forgotten that one
        sleep 5
    done
    return 1
}
word() { sed -n "s/ Command=.*//; s/.* $1=\([^ ]*\).*/\1/p" | grep -vx '(null)'; }
fact() { show "$job" | word "$1"; }
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # of this job, or left over from the one that it was submitted in?
    case $(show "$SLURM_JOB_ID") in
    '' | *' ArrayTaskId='*)
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the bare number may mean the whole array
        ;;
    *) unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID ;;
    esac
fi
restarts=$(fact Restarts)
export SLURM_RESTART_COUNT=${restarts:-${SLURM_RESTART_COUNT:-0}}
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun does not inherit it
"""

_RUN = r"""
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || RUN_DIR=$RUN_DIR/$SLURM_ARRAY_TASK_ID
mkdir -p "$RUN_DIR" || exit 9
RUN_DIR=$(realpath -s "$RUN_DIR")
paths=("$RUN_DIR" ${DATA:+"$DATA"})
"""

_AGAIN = r"""
# A guard is the same job, waiting for another one to fail where nothing in that can act: its batch shell was killed, say.
guard=
if [ -n "${GPT2HPC_GUARDS:-}" ]; then # this is one: has the other failed, and is there something left to do?
    told=$(show "$GPT2HPC_GUARDS" || echo "JobId=$GPT2HPC_GUARDS JobState=$(sacct -X -n -P -o State -j "$GPT2HPC_GUARDS")")
    read -r action code _ _ _ reason < <("${run[@]}" -m gpt2hpc.cluster.guard "$RUN_DIR" --job "$GPT2HPC_GUARDS" \
        --by "$job" --succeeds "${GPT2HPC_SUCCEEDS:-}" <<<"$told" | tail -n 1)
    echo "gpt2hpc: job $job, the guard of job $GPT2HPC_GUARDS: ${reason:-cannot decide whether to take over, see above}"
    [ "$action" = requeue ] || exit "${code:-1}"
elif [ "$SLURM_RESTART_COUNT" = 0 ] && ! "${run[@]}" -m gpt2hpc.cluster.requeue may-start "$RUN_DIR" --job "$job"; then
    exit 9 # another job has the run: what follows is for that one to keep
fi

# What submits this run again is kept: for a refused requeue, for a guard, for `gpt2hpc resume`, and to be called by hand.
again=$RUN_DIR/slurm/resume.sh
keep_again() (
    umask 077 # the script may hold what is nobody else's business
    scontrol write batch_script "$SLURM_JOB_ID" "$RUN_DIR/slurm/job.sh" >/dev/null || return
    sed -i -E '/^#SBATCH +(--(array|dependency|kill-on-invalid-dep|hold)|-[adH])\b/d' "$RUN_DIR/slurm/job.sh" # those of this job alone
    if [ -n "${PICKLES:-}" ]; then # submitit looks for one of the job's own number
        own=$PICKLES/${job}_submitted.pkl pickle=$RUN_DIR/slurm/submitted.pkl
        if [ -e "$own" ]; then cp "$own" "$pickle"; else cp "$pickle" "$own"; fi
    fi
    shown=$(show "$job")
    name=${log##*/}
    case $name in *"$SLURM_JOB_ID"*) name=${name%"$SLURM_JOB_ID"*}%j${name##*"$SLURM_JOB_ID"} ;; esac
    options=(--export=ALL "--job-name=$SLURM_JOB_NAME" "--nodes=$SLURM_JOB_NUM_NODES" "--partition=$SLURM_JOB_PARTITION")
    for option in "time=$(word TimeLimit <<<"$shown")" "account=$(word Account <<<"$shown")" "qos=$(word QOS <<<"$shown")" \
        "constraint=$(word Features <<<"$shown")" "nodelist=$(word ReqNodeList <<<"$shown")" "exclude=$(word ExcNodeList <<<"$shown")" \
        "ntasks-per-node=${SLURM_NTASKS_PER_NODE:-}" "cpus-per-task=${SLURM_CPUS_PER_TASK:-}" \
        "gpus-per-node=${SLURM_GPUS_PER_NODE:-}" "mem=${SLURM_MEM_PER_NODE:-}" "mem-per-cpu=${SLURM_MEM_PER_CPU:-}" \
        "reservation=${SLURM_JOB_RESERVATION:-}" "output=${log:+${log%/*}/$name}"; do
        case $option in *= | mem*=0) ;; *) options+=("--$option") ;; esac
    done
    {
        echo '#!/bin/bash'
        echo "# Submits this run again as job $job was, with more options of sbatch if you like; prints the new job's number."
        printf 'cd %q || exit\n' "$PWD"
        for name in RUN_DIR DATA PRESET STEPS PYTHON IMAGE RUNTIME BINDS CONTAINER_ENV GUARD MASTER_ADDR_SUFFIX \
            OMP_NUM_THREADS TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR; do
            if [ -n "${!name+x}" ]; then printf 'export %s=%q\n' "$name" "${!name}"; else echo "unset $name"; fi
        done
        # Those of the job that calls it are not the new one's.
        printf 'for name in "%s" "%s"; do [ "%s" = SLURM_CONF ] || unset "%s"; done\n' "\${!SLURM_@}" "\${!SRUN_@}" "\$name" "\$name"
        printf 'number=%s --parsable' "\$(sbatch"
        printf ' %q' "${options[@]}"
        printf ' "%s"' "\$@"
        printf ' %q' "$RUN_DIR/slurm/job.sh" "$@"
        printf ') || exit\n%s | tee -a %q\n' "echo \"\${number%%;*}\"" "$RUN_DIR/slurm/jobs"
    } >"$again.$job" && mv "$again.$job" "$again"
)
case ${PYTHON:-python3} in */*) ;; *) PYTHON=$(command -v "${PYTHON:-python3}") ;; esac
mkdir -p "$RUN_DIR/slurm"
show "$job" >/dev/null # when it answers, it will answer this too
log=$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p')
log_began=$(stat -c %s "$log" 2>/dev/null)
keep_again "$@" || echo "gpt2hpc: cannot keep how job $job was submitted; where a requeue is refused it ends"
[ -z "$log" ] || echo "$job $log" >>"$RUN_DIR/slurm/logs"

# Jobs that wait for this run to finish, as those of a pipeline, wait for the job that goes on with it, too.
follow() {
    [ -e "$RUN_DIR/slurm/dependents" ] || return 0
    while read -r waiting; do
        scontrol update "JobId=$waiting" "Dependency=afterok:$job?afterok:$1"
    done <"$RUN_DIR/slurm/dependents"
}

if [ -n "${GUARD:-}" ]; then # one for each job, whatever became of its first start
    [ ! -e "$RUN_DIR/slurm/guard" ] || read -r guard guarded <"$RUN_DIR/slurm/guard"
    [ "${guarded:-}" = "$job" ] || guard=
    if [ -z "$guard" ]; then
        guard=$(GPT2HPC_GUARDS=$job GPT2HPC_SUCCEEDS=$job${GPT2HPC_SUCCEEDS:+,$GPT2HPC_SUCCEEDS} \
            bash "$again" "--dependency=afternotok:$job" --kill-on-invalid-dep=yes)
        echo "gpt2hpc: job ${guard:-no other} guards job $job"
        [ -z "$guard" ] || { echo "$guard $job" >"$RUN_DIR/slurm/guard" && follow "$guard"; }
    fi
fi
is_guarded() { [ -n "$guard" ] && [ "$(show "$guard" | word JobState)" = PENDING ]; }
"""

_OUT = r"""
mkdir -p "$OUT" || exit 4
OUT=$(realpath -s "$OUT")
paths=("$OUT" ${SOURCE:+"$SOURCE"})
"""

_MODELS = r"""
paths=(${MODEL:+"$MODEL"} ${HELLASWAG:+"$HELLASWAG"} ${DATA:+"$DATA"} "$(dirname "${OUT:-.}")")
"""

_PYTHON = r"""
# How Python is run here, in the image if there is one: "${run[@]}" by this shell, "${srun_python[@]}" by srun.
srun_python=()
if [ -n "${IMAGE:-}" ]; then
    unset PYTHONPATH PYTHONHOME APPTAINER_CLEANENV SINGULARITY_CLEANENV # the host's would leak in, the ranks' be kept out
fi
if [ -n "${IMAGE:-}" ] && [ "${RUNTIME:-}" = pyxis ]; then # a plugin of srun
    mounts=(/tmp ${BINDS:+"$BINDS"})
    for path in "$PWD" "${paths[@]}"; do
        if [ "$path" != / ] && [ -e "$path" ]; then mounts+=("$(realpath -s "$path")" "$(realpath "$path")"); fi
    done
    srun_python=("--container-image=$IMAGE" "--container-mounts=$(IFS=,; echo "${mounts[*]}")" "--container-workdir=$PWD"
        --no-container-mount-home --container-readonly --no-container-entrypoint
        "--container-env=${CONTAINER_ENV:-OMP_NUM_THREADS}" python3) # of the host, not of the image
    # shellcheck disable=SC2317 # it is called as "${run[@]}"
    in_a_step() { # which Slurm refuses to a job that it preempts: then the host's Python, or Slurm itself, must do
        if srun "${one_task[@]}" true </dev/null 2>/dev/null; then
            srun "${one_task[@]}" "${srun_python[@]}" "$@"
        elif "${PYTHON:-python3}" -c 'import gpt2hpc.cluster.requeue' </dev/null 2>/dev/null; then
            "${PYTHON:-python3}" "$@"
        else
            sleep 600 # until Slurm ends the job, and begins it again where it does that
        fi
    }
    one_task=(--nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap --export=ALL)
    run=(in_a_step)
elif [ -n "${IMAGE:-}" ]; then
    run=("${RUNTIME:-apptainer}" --quiet exec --pwd "$PWD")
    if "${run[0]}" exec --help | grep -q -e --no-eval; then run+=(--no-eval); fi
    for path in "$PWD" "${paths[@]}"; do # by its name, and by what that leads to
        if [ "$path" != / ] && [ -e "$path" ]; then run+=(--bind "$(realpath -s "$path")" --bind "$(realpath "$path")"); fi
    done
    [ -z "${BINDS:-}" ] || run+=(--bind "$BINDS")
    [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || run+=(--nv)
    run+=("$IMAGE" python3)
else
    run=("${PYTHON:-python3}")
fi
[ "${#srun_python[@]}" != 0 ] || srun_python=("${run[@]}")

if [ "$SLURM_RESTART_COUNT" = 0 ] && ! "${run[@]}" -c 'import gpt2hpc.cluster.requeue'; then
    echo "gpt2hpc: not installed for ${srun_python[*]}; activate its environment before sbatch, or set PYTHON or IMAGE" >&2
    exit 8
fi
"""

_RANKS = r"""
# When the job will be killed: the ranks save before, with or without a signal.
unset GPT2HPC_JOB_END
end=$(fact EndTime)
if [ -n "$end" ] && end=$(date -d "$end" +%s 2>/dev/null); then export GPT2HPC_JOB_END=$end; fi

# Where the ranks meet: rank 0's node, by an address that is not its name for itself, at a port that nothing there uses.
MASTER_ADDR=127.0.0.1
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    known=$(scontrol show node -o "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    for name in "$head${MASTER_ADDR_SUFFIX:-}" "$known" "$(hostname -I | awk '{ print $1 }')"; do
        MASTER_ADDR=$(getent ahostsv4 "$name" | awk 'NR == 1 { print $1 }')
        case $MASTER_ADDR in '' | 127.*) MASTER_ADDR=${known:-$head} ;; *) break ;; esac
    done
fi
MASTER_PORT=$((10000 + (SLURM_JOB_ID + 997 * SLURM_RESTART_COUNT) % 20000)) # below those that the kernel hands out
is_free() { # nothing listens there, and no other job that starts here has chosen it: the lock is this shell's until it ends
    if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then return 1; fi
    (: >>"/tmp/gpt2hpc-port-$1") 2>/dev/null
    { exec {lock}<"/tmp/gpt2hpc-port-$1" && command -v flock >/dev/null; } 2>/dev/null || return 0
    flock --nonblock "$lock"
}
until is_free "$MASTER_PORT"; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT

export GPT2HPC_SRUN=1 # a task of srun is a rank
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} # another number would change the last bits
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 # keep the memory of the logits between steps
scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
[ -z "${IMAGE:-}" ] || scratch=/tmp # what else a host has may be missing inside
scratch=$scratch/gpt2hpc-${USER:-user}-$SLURM_JOB_ID # compilers' caches break on a shared disk
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
"""

TEAR_DOWN = r"""
rc=$?
decide() {
    show "$job" | "${run[@]}" -m gpt2hpc.cluster.requeue decide "$RUN_DIR" --restart "$SLURM_RESTART_COUNT" \
        --succeeds "${GPT2HPC_SUCCEEDS:-}" --exit-code "$rc" --died-on "$died_on" "$@" | tail -n 1
}
# The node whose rank ended first, as srun saw it.
died_on=$(tail -c "+$((${log_began:-0} + 1))" "$log" | sed -n 's/^srun: error: \([^: ]*\): tasks\? .*/\1/p' | head -n 1)
case $died_on in *[][,]*) died_on= ;; esac # several at once
read -r action code delay_s allow exclude reason < <(decide)
echo "gpt2hpc: job $job: ${action:-cannot decide what comes next}: ${reason:-see above; the ranks ended with code $rc}"
if [ "$action" = requeue ]; then
    state=$(fact JobState)
    if [ "${state:-RUNNING}" != RUNNING ]; then # cancelled while that was thought over
        echo "gpt2hpc: job $job is $state by now, and so not requeued"
        exit "$code"
    fi
    [ "$allow" = 0 ] || scontrol update "JobId=$job" Requeue=1
    if [ "$exclude" != - ]; then # not if too few nodes would be left
        out=" $(scontrol show hostnames "$exclude" | tr '\n' ' ')"
        left=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp -o '%N %f' |
            awk -v out="$out" -v feature="$(fact Features)" 'index(out, " " $1 " ") == 0 &&
                (feature == "" || index("," $2 ",", "," feature ",")) && !seen[$1]++ { n++ } END { print n + 0 }')
        [ "${left:-0}" -ge "$SLURM_JOB_NUM_NODES" ] || exclude=-
    fi
    if scontrol requeue "$job"; then # what follows works only after it, and it ends this shell soon
        [ "$exclude" = - ] || scontrol update "JobId=$job" "ExcNodeList=$exclude"
        [ "$delay_s" = 0 ] || scontrol update "JobId=$job" "StartTime=now+$delay_s"
        exit "$code"
    fi
    read -r action code delay_s allow exclude reason < <(decide --refused)
fi
if [ "$action" = resubmit ]; then # the same job under another number: the guard's, or a new one
    if is_guarded; then
        successor=$guard
        [ "$exclude" = - ] || scontrol update "JobId=$guard" "ExcNodeList=$exclude"
        [ "$delay_s" = 0 ] || scontrol update "JobId=$guard" "StartTime=now+$delay_s"
    else
        more=("--begin=now+$delay_s")
        [ "$exclude" = - ] || more+=("--exclude=$exclude")
        successor=$(GPT2HPC_GUARDS='' GPT2HPC_SUCCEEDS=$job${GPT2HPC_SUCCEEDS:+,$GPT2HPC_SUCCEEDS} bash "$again" "${more[@]}")
    fi
    if [ -n "$successor" ]; then
        echo "gpt2hpc: job $job goes on as job $successor"
        follow "$successor"
    else
        echo "gpt2hpc: job $job could not be submitted again either; where sbatch works, bash $again does it"
    fi
elif [ -n "$action" ] && is_guarded; then # there is nothing to take over
    scancel "$guard"
fi
if [ -z "$action" ]; then code=$((rc == 0 ? 1 : rc)); fi
[ "$code" -le 10 ] || code=1 # other codes mean something to Slurm, to shells or to submitit
exit "$code"
"""

PREPARE_TEAR_DOWN = r"""
rc=$?
# Stopped before its units were done (6), or killed: once more, unless it was cancelled, or requeued by Slurm itself.
if [ "$rc" = 6 ] || { [ "$rc" -ge 128 ] && [ "$SLURM_RESTART_COUNT" -lt 5 ]; }; then
    if [ "$(fact JobState)" = RUNNING ]; then
        scontrol update "JobId=$job" Requeue=1
        if scontrol requeue "$job"; then exit 6; fi
    fi
fi
[ "$rc" -le 10 ] || rc=1 # other codes mean something to Slurm, to shells or to submitit
exit "$rc"
"""


EVALUATE_TEAR_DOWN = r"""
rc=$?
# Nothing is kept between starts. Signalled, as by a preemption: begun anew, unless it was cancelled, or requeued by Slurm itself.
if [ "$rc" -ge 128 ] && [ "$SLURM_RESTART_COUNT" -lt 5 ] && [ "$(fact JobState)" = RUNNING ]; then
    scontrol update "JobId=$job" Requeue=1
    if scontrol requeue "$job"; then exit 6; fi
fi
[ "$rc" -le 10 ] || rc=1 # other codes mean something to Slurm, to shells or to submitit
exit "$rc"
"""


def _joined(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts)


SRUN = f"srun_args=({' '.join(SRUN_ARGS)})"
BLOCKS = {
    "set-up": _joined(_JOB, _RUN, _PYTHON, _AGAIN, _RANKS),
    "tear-down": TEAR_DOWN,
    "srun": SRUN,
    "prepare set-up": _joined(_JOB, _OUT, _PYTHON),
    "prepare tear-down": PREPARE_TEAR_DOWN,
    "evaluate set-up": _joined(_JOB, _MODELS, _PYTHON, _RANKS),
    "evaluate tear-down": EVALUATE_TEAR_DOWN,
}
KINDS = ("prepare ", "evaluate ", "")
"""Of templates: for preparing data, for evaluation, for training; each has a set-up and a tear-down of its own."""


def lines(block: str) -> list[str]:
    """A block between the marks by which it is found again."""
    return [f"# >>> gpt2hpc {block} >>>", *BLOCKS[block].strip("\n").split("\n"), f"# <<< gpt2hpc {block} <<<"]


def refreshed(text: str, path: Path) -> str:
    """A template with the blocks of today; ConfigError where one is missing."""
    kind = next((kind for kind in KINDS if f"# >>> gpt2hpc {kind}set-up >>>" in text), "")
    for block in (f"{kind}set-up", "srun", f"{kind}tear-down"):
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
