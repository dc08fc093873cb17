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
