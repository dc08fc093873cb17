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
