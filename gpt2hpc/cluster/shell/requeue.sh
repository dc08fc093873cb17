# How many of the nodes that sinfo lists can be used, without those in $1. What is more than the name of a feature is Slurm's to judge: `a&b`, say.
usable() {
    awk -v out="$1" -v feature="$2" '
        index(out, " " $1 " ") || $2 ~ /down|drain|fail|maint|reserved|unknown|inval|\*$/ || seen[$1]++ { next }
        feature == "" || feature ~ /[^[:alnum:]_.-]/ || index("," $3 ",", "," feature ",") { n++ }
        END { print n + 0 }'
}
# The nodes of a list that the next start can do without: `-` where too few would be left in the partition.
excludable() {
    if [ "${1:--}" = - ]; then
        echo -
        return
    fi
    out=" $(scontrol show hostnames "$1" | tr '\n' ' ')"
    left=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o '%N %T %f' | usable "$out" "$(fact Features)")
    if [ "${left:-0}" -ge "$SLURM_JOB_NUM_NODES" ]; then
        echo "$1"
    else
        echo "gpt2hpc: $1 cannot be left out: the partition has ${left:-0} other nodes, and job $job needs $SLURM_JOB_NUM_NODES" >&2
        echo -
    fi
}
# Back into the queue as itself, without the nodes $1 (`-`: those of now), not before $2 seconds have gone; $3 is 1 where requeuing
# must be switched on first. It fails where that is refused; else this shell ends soon.
requeue_without() {
    [ "$3" = 0 ] || scontrol update "JobId=$job" Requeue=1
    scontrol requeue "$job" || return # what follows works only after it
    [ "$1" = - ] || scontrol update "JobId=$job" "ExcNodeList=$1"
    [ "$2" = 0 ] || scontrol update "JobId=$job" "StartTime=now+$2"
    return 0 # requeued it is, whatever became of that
}
