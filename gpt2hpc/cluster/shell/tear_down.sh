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
stay_away_if_cancelled() { # while that was thought over
    state=$(fact JobState)
    if [ "${state:-RUNNING}" = RUNNING ]; then return; fi
    echo "gpt2hpc: job $job is $state by now, and so does not go on"
    exit "$code"
}
if [ "$action" = requeue ]; then
    stay_away_if_cancelled
    exclude=$(excludable "$exclude")
    if [ "$exclude" != - ] && is_guarded; then scontrol update "JobId=$guard" "ExcNodeList=$exclude"; fi
    if requeue_without "$exclude" "$delay_s" "$allow"; then exit "$code"; fi
    read -r action code delay_s allow exclude reason < <(decide --refused)
    exclude=$(excludable "$exclude")
fi
if [ "$action" = resubmit ]; then # the same job under another number: the guard's, or a new one
    stay_away_if_cancelled
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
