# Unprivileged, a process of the user's own serves the files of an image (FUSE). Without cgroups Slurm signals it with the ranks, which die
# of that unsaved; there, and where FUSE may not be used, the image is unpacked once on each node, for this job and later ones.
is_setuid() { [ -u "$("$1" buildcfg | sed -n 's/^LIBEXECDIR=//p')/${1##*/}/bin/starter-suid" ]; }
is_safe() { scontrol show config | grep -q '^ProctrackType *= *proctrack/cgroup' && [ -w /dev/fuse ]; }
# In a directory that is the user's alone: in /tmp others could have put theirs first. What has no .whole beside it, for it was not finished
# or is to go, is no image; nobody's for 30 days, it goes.
# shellcheck disable=SC2016 # for the shell of each node
unpack='umask 077
    if [ "$(stat -f -c %T /tmp)" = tmpfs ]; then
        echo "gpt2hpc: on $HOSTNAME /tmp is memory, too dear for an image" >&2
        exit 1
    fi
    mkdir -p "$1" && [ ! -L "$1" ] && [ -O "$1" ] && chmod 700 "$1" && cd "$1" || exit
    for old in */; do
        old=${old%/}
        if [ ! -d "$old" ] || [ "$old" = "$2" ] || [ -n "$(find "$old.whole" -mtime -30 2>/dev/null)" ]; then continue; fi
        (flock --nonblock 3 && rm -f "$old.whole" && rm -rf "$old") 3>>"$old.lock"
    done
    exec 3>>"$2.lock" && flock 3 || exit
    [ -e "$2.whole" ] || { rm -rf "$2" && mkdir "$2" && "$3" --quiet build --sandbox "$2/image" "$4"; } && touch "$2.whole"'
unpacked() { # sets `image`; $1 is the program
    image=$IMAGE
    if [ ! -f "$IMAGE" ] || is_setuid "$1" || is_safe; then return; fi
    local folder name
    folder=/tmp/gpt2hpc-$(id -u)-images
    name=$(stat -L -c '%n %s %Y' "$IMAGE" | cksum | tr ' ' -)
    echo "gpt2hpc: job $job: the image is unpacked to $folder/$name on each node: Slurm would signal what serves its files"
    if srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL bash -c "$unpack" unpack \
        "$folder" "$name" "$1" "$IMAGE" </dev/null; then
        image=$folder/$name/image
    else
        echo "gpt2hpc: job $job: it cannot be unpacked there; a preemption may end the ranks before they have saved" >&2
    fi
}
