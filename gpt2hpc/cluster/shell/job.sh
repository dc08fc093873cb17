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
