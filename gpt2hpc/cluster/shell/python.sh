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
    in_docker='given=()
        for name in $(compgen -e); do
            case $name in PATH | HOME | PWD | OLDPWD | SHLVL | _ | LD_* | DOCKER_*) ;; *) given+=(--env "$name") ;; esac
        done
        for ((n = 0; n < ${SLURM_RESTART_COUNT:-0}; n++)); do
            docker ps --quiet --filter "label=gpt2hpc.start=$SLURM_JOB_ID.$n"
        done | xargs --no-run-if-empty docker kill >/dev/null
        exec docker run "${given[@]}" --label "gpt2hpc.start=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"'
    run=(bash -c "$in_docker" docker --rm --interactive --read-only --network=host --ipc=host
        --user "$(id -u):$(id -g)" --env HOME=/tmp --workdir "$PWD" --entrypoint python3)
    for group in $(id -G); do run+=(--group-add "$group"); done
    for path in /tmp "${seen[@]}"; do run+=(--volume "$path:$path"); done
    IFS=, read -r -a binds <<<"${BINDS:-}"
    for bind in "${binds[@]}"; do case $bind in *:*) run+=(--volume "$bind") ;; *) run+=(--volume "$bind:$bind") ;; esac done
    [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || run+=(--gpus all) # CUDA_VISIBLE_DEVICES, which goes along, says which
    run+=("$IMAGE")
    ;;
*)
    run=("${RUNTIME:-apptainer}" --quiet exec --pwd "$PWD")
    if "${run[0]}" exec --help | grep -q -e --no-eval; then run+=(--no-eval); fi
    for path in "${seen[@]}"; do run+=(--bind "$path"); done
    [ -z "${BINDS:-}" ] || run+=(--bind "$BINDS")
    [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || run+=(--nv)
    image=$IMAGE
    is_setuid() { [ -u "$("$1" buildcfg | sed -n 's/^LIBEXECDIR=//p')/${1##*/}/bin/starter-suid" ]; }
    is_safe() { scontrol show config | grep -q '^ProctrackType *= *proctrack/cgroup' && [ -w /dev/fuse ]; }
    if [ -f "$IMAGE" ] && ! is_setuid "${run[0]}" && ! is_safe; then
        # Unprivileged, a process of the user's serves the image's files; without cgroups, Slurm signals it with the ranks, which die of
        # that. So the image is unpacked once a node, where it stays for other jobs, and for two weeks after the last.
        mine=/tmp/gpt2hpc-${USER:-user}-image
        unpacked=$mine-$(stat -L -c '%n %s %Y' "$IMAGE" | cksum | tr -s ' ' -)
        # shellcheck disable=SC2016 # for the shell of each node
        unpack='find /tmp -maxdepth 1 -user "$(id -u)" -name "${0##*/}-*" -mtime +14 -exec rm -rf {} +
            umask 077 && exec 3>>"$1.lock" && flock 3 && touch "$1.lock"
            [ -d "$1" ] || { rm -rf "$1.new" && "$2" --quiet build --sandbox "$1.new" "$3" && mv -T "$1.new" "$1"; } && touch "$1"'
        echo "gpt2hpc: job $job: the image is unpacked to $unpacked on each node: Slurm would signal what serves its files"
        if srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL bash -c "$unpack" \
            "$mine" "$unpacked" "${run[0]}" "$IMAGE" </dev/null; then image=$unpacked; else
            echo "gpt2hpc: job $job: it cannot be unpacked there; a preemption may end the ranks before they have saved" >&2
        fi
    fi
    run+=("$image" python3)
    ;;
esac
[ "${#srun_python[@]}" != 0 ] || srun_python=("${run[@]}")

if [ "$SLURM_RESTART_COUNT" = 0 ] && ! "${run[@]}" -c 'import gpt2hpc.cluster.requeue'; then
    echo "gpt2hpc: not installed for ${srun_python[*]}; activate its environment before sbatch, or set PYTHON or IMAGE" >&2
    exit 8
fi
