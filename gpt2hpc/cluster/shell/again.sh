# A guard is the same job, waiting for another one to fail where nothing in that can act: its batch shell was killed, say.
guard=
exclude=-
if [ -n "${GPT2HPC_GUARDS:-}" ]; then # this is one: has the other failed, and is there something left to do?
    told=$(show "$GPT2HPC_GUARDS" || echo "JobId=$GPT2HPC_GUARDS JobState=$(sacct -X -n -P -o State -j "$GPT2HPC_GUARDS")")
    read -r action code delay_s allow exclude reason < <({ echo "$told" && show "$job"; } |
        "${run[@]}" -m gpt2hpc.cluster.guard "$RUN_DIR" --job "$GPT2HPC_GUARDS" --by "$job" \
            --succeeds "${GPT2HPC_SUCCEEDS:-}" | tail -n 1)
    echo "gpt2hpc: job $job, the guard of job $GPT2HPC_GUARDS: ${reason:-cannot decide whether to take over, see above}"
    exclude=$(excludable "$exclude")
    if [ "$action" = requeue ] && [ "$exclude" != - ]; then # what it was given is no good
        if requeue_without "$exclude" "$delay_s" "$allow"; then exit "$code"; fi
    elif [ "$action" != requeue ] && [ "$action" != start ]; then
        exit "${code:-1}"
    fi
elif [ "$SLURM_RESTART_COUNT" = 0 ] && ! "${run[@]}" -m gpt2hpc.cluster.requeue may-start "$RUN_DIR" --job "$job"; then
    exit 9 # another job has the run: what follows is for that one to keep
fi

# What submits this run again is kept: for a refused requeue, for a guard, for `gpt2hpc resume`, and to be called by hand.
again=$RUN_DIR/slurm/resume.sh
keep_again() (
    umask 077 # the script may hold what is nobody else's business
    scontrol write batch_script "$SLURM_JOB_ID" "$RUN_DIR/slurm/job.sh" >/dev/null || return
    # Without what was that job's alone, however many options a line has.
    sed -i -E ':more; s/^(#SBATCH[^"]*)[[:space:]](--(array|dependency|kill-on-invalid-dep)([[:space:]]+|=)[^[:space:]]+|-[ad][[:space:]]*[^[:space:]]+|--hold|-H)([[:space:]].*)?$/\1\5/; t more; /^#SBATCH[[:space:]]*$/d' "$RUN_DIR/slurm/job.sh"
    if [ -n "${PICKLES:-}" ]; then # submitit looks for one of the job's own number
        own=$PICKLES/${job}_submitted.pkl pickle=$RUN_DIR/slurm/submitted.pkl
        if [ -e "$own" ]; then cp "$own" "$pickle"; else cp "$pickle" "$own"; fi
    fi
    shown=$(show "$job")
    left_out=$(word ExcNodeList <<<"$shown")
    [ "${exclude:--}" = - ] || left_out=$exclude # of a guard, whose own list may be an older one
    name=${log##*/}
    case $name in *"$SLURM_JOB_ID"*) name=${name%"$SLURM_JOB_ID"*}%j${name##*"$SLURM_JOB_ID"} ;; esac
    options=(--export=ALL "--job-name=$SLURM_JOB_NAME" "--nodes=$SLURM_JOB_NUM_NODES" "--partition=$SLURM_JOB_PARTITION")
    for option in "time=$(word TimeLimit <<<"$shown")" "account=$(word Account <<<"$shown")" "qos=$(word QOS <<<"$shown")" \
        "constraint=$(word Features <<<"$shown")" "nodelist=$(word ReqNodeList <<<"$shown")" "exclude=$left_out" \
        "ntasks-per-node=${SLURM_NTASKS_PER_NODE:-}" "cpus-per-task=${SLURM_CPUS_PER_TASK:-}" \
        "gpus-per-node=${SLURM_GPUS_PER_NODE:-}" "mem=${SLURM_MEM_PER_NODE:-}" "mem-per-cpu=${SLURM_MEM_PER_CPU:-}" \
        "mem-per-gpu=${SLURM_MEM_PER_GPU:-}" "reservation=${SLURM_JOB_RESERVATION:-}" "output=${log:+${log%/*}/$name}"; do
        case $option in *= | mem*=0) ;; *) options+=("--$option") ;; esac
    done
    {
        echo '#!/bin/bash'
        echo "# Submits this run again as job $job was, with more options of sbatch if you like; prints the new job's number."
        printf 'cd %q || exit\n' "$PWD"
        for name in RUN_DIR DATA PRESET STEPS PYTHON IMAGE RUNTIME BINDS CONTAINER_ENV GUARD MASTER_ADDR_SUFFIX \
            OMP_NUM_THREADS GPT2HPC_CACHE_DIR TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR CUDA_CACHE_PATH; do
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
