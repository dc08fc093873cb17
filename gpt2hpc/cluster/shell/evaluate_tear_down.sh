rc=$?
if { [ "$rc" = 138 ] || [ "$rc" = 140 ]; } && [ "$(fact PreemptTime)" = None ]; then # Slurm's warning, by USR1 or USR2
    echo "gpt2hpc: job $job ends with its time limit, and would not get further if it were begun anew; give it more time"
    exit 1
fi
# Nothing is kept between starts. Signalled, as by a preemption: begun anew, unless it was cancelled, or requeued by Slurm itself.
if [ "$rc" -ge 128 ] && [ "$SLURM_RESTART_COUNT" -lt 5 ] && [ "$(fact JobState)" = RUNNING ]; then
    scontrol update "JobId=$job" Requeue=1
    if scontrol requeue "$job"; then exit 6; fi
fi
[ "$rc" -le 10 ] || rc=1 # other codes mean something to Slurm, to shells or to submitit
exit "$rc"
