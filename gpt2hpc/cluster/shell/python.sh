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
