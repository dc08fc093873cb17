# How Python is run here, in the image if there is one: "${run[@]}" by this shell, "${srun_python[@]}" by srun.
srun_python=() seen=()
[ "${RUNTIME:-}" != none ] || IMAGE=
if [ -n "${IMAGE:-}" ]; then
    # The host's would leak in, and name what is not there: packages, libraries, compilers; the last two would keep the ranks' out.
    unset PYTHONPATH PYTHONHOME PYTHONSTARTUP LD_PRELOAD CC CXX CFLAGS CXXFLAGS LDFLAGS APPTAINER_CLEANENV SINGULARITY_CLEANENV
    for path in "$PWD" "${paths[@]}"; do # is seen inside by its name, and by what that leads to
        if [ "$path" = / ] || [ ! -e "$path" ]; then continue; fi
        for name in "$(realpath -s "$path")" "$(realpath "$path")"; do
            case " ${seen[*]} " in *" $name "*) ;; *) seen+=("$name") ;; esac
        done
    done
fi
case ${IMAGE:+${RUNTIME:-apptainer}} in
'') run=("${PYTHON:-python3}") ;;
pyxis) # a plugin of srun
    seen+=(/tmp ${BINDS:+"$BINDS"})
    srun_python=("--container-image=$IMAGE" "--container-mounts=$(IFS=,; echo "${seen[*]}")" "--container-workdir=$PWD"
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
    ;;
docker) # its daemon starts what runs inside, so a rank that is killed outright may leave a container: the next start ends it
    # shellcheck disable=SC2016 # for the shell of each rank: it hands on all variables, by their names alone, but the host's own
    in_docker='gpus=${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS:-all}} given=()
        for name in $(compgen -e); do
            case $name in
            PATH | HOME | PWD | OLDPWD | SHLVL | _ | LD_* | DOCKER_* | CUDA_VISIBLE_DEVICES) ;; # the latter: they are numbered anew inside
            *) given+=(--env "$name") ;;
            esac
        done
        [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || given+=(--gpus "$([ "$gpus" = all ] && echo all || echo "\"device=$gpus\"")")
        start=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
        live() { docker ps --quiet --filter "label=$1" | sort; }
        all=$(live "gpt2hpc.job=$SLURM_JOB_ID") own=$(live "gpt2hpc.start=$start") # in this order: a rank beside this one may just begin
        comm -23 <(echo "$all") <(echo "$own") | xargs --no-run-if-empty docker kill >/dev/null
        exec docker run "${given[@]}" --label "gpt2hpc.job=$SLURM_JOB_ID" --label "gpt2hpc.start=$start" "$@"'
    run=(bash -c "$in_docker" docker --rm --interactive --read-only --network=host --ipc=host
        --user "$(id -u):$(id -g)" --env HOME=/tmp --workdir "$PWD" --entrypoint python3)
    for group in $(id -G); do run+=(--group-add "$group"); done
    IFS=, read -r -a binds <<<"${BINDS:-}"
    for bind in /tmp "${seen[@]}" "${binds[@]}"; do # each target once, or docker refuses
        case " ${run[*]} " in *",target=${bind#*:} "*) ;; *) run+=(--mount "type=bind,source=${bind%%:*},target=${bind#*:}") ;; esac
    done
    run+=("$IMAGE")
    ;;
*)
    run=("${RUNTIME:-apptainer}" --quiet exec --pwd "$PWD")
    if "${run[0]}" exec --help | grep -q -e --no-eval; then run+=(--no-eval); fi
    for path in "${seen[@]}"; do run+=(--bind "$path"); done
    [ -z "${BINDS:-}" ] || run+=(--bind "$BINDS")
    [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || run+=(--nv)
    unpacked "${run[0]}"
    run+=("$image" python3)
    ;;
esac
[ "${#srun_python[@]}" != 0 ] || srun_python=("${run[@]}")

if [ "$SLURM_RESTART_COUNT" = 0 ] && ! "${run[@]}" -c 'import gpt2hpc.cluster.requeue'; then
    echo "gpt2hpc: not installed for ${srun_python[*]}; activate its environment before sbatch, or set PYTHON or IMAGE" >&2
    exit 8
fi
