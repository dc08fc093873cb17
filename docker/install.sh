#!/bin/sh
# What docker/Dockerfile and apptainer.def do alike: gpt2hpc and all that it needs, in /opt/gpt2hpc of a Debian or Ubuntu.
#
#   install.sh system     compilers and RDMA, and Python where the base has none
#   install.sh torch      a virtual environment, and torch in it unless the base brings its own
#   install.sh packages   everything else, each by its hash
#   install.sh project    gpt2hpc from this checkout
#   install.sh            all four
#
# Variables, which are the arguments of both files: TORCH_SPEC, TORCH_INDEX_URL, INSTALL_TORCH, PIP_OPTIONS, VERSION, SOURCE_DATE_EPOCH.
set -eu
umask 022

checkout=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=/opt/gpt2hpc
python=$venv/bin/python3
[ -n "${SOURCE_DATE_EPOCH:-}" ] || unset SOURCE_DATE_EPOCH
# NGC's images constrain every pip to their own versions: the lock would be refused, and torch is out of pip's reach anyway.
unset PIP_CONSTRAINT

fail() {
    echo "install.sh: error: $*" >&2
    exit 1
}

pip_install() {
    # shellcheck disable=SC2086 # a list of words
    "$python" -m pip install --quiet --disable-pip-version-check --no-input --no-cache-dir ${PIP_OPTIONS:-} "$@"
}

add_packages() {
    missing=
    for package; do
        dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    apt-get update
    # shellcheck disable=SC2086 # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
    rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log /var/cache/ldconfig/aux-cache
}

system() {
    command -v apt-get >/dev/null || fail "BASE_IMAGE has no apt-get: give a Debian or Ubuntu"
    # Compilers and headers: Triton and inductor compile at run time. RDMA: neither --nv nor NVIDIA's hook brings such a library, and
    # without libibverbs NCCL falls back to sockets without a word.
    add_packages gcc g++ libc6-dev libibverbs1 ibverbs-providers librdmacm1 libnuma1
    command -v python3 >/dev/null || add_packages python3 python3-venv python3-dev
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "BASE_IMAGE has $(python3 --version), and gpt2hpc needs 3.11 or newer: give Debian 12, Ubuntu 24.04 or newer"
    python3 -m ensurepip --version >/dev/null 2>&1 || add_packages python3-venv
    headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$headers/Python.h" ] || add_packages python3-dev
}

torch_version() {
    "$1" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null
}

torch() {
    # In /opt: /home and /root are the caller's at run time.
    case ${INSTALL_TORCH:-auto} in
    auto | skip) ;;
    *) fail "INSTALL_TORCH=$INSTALL_TORCH is neither auto nor skip" ;;
    esac
    if own=$(torch_version python3); then
        echo "torch $own of the base is kept"
        python3 -m venv --system-site-packages $venv
        return
    fi
    [ "${INSTALL_TORCH:-auto}" = auto ] || fail "INSTALL_TORCH=skip, and BASE_IMAGE has no torch: give INSTALL_TORCH=auto, or another base"
    python3 -m venv $venv
    pip_install ${TORCH_INDEX_URL:+"--index-url=$TORCH_INDEX_URL"} "${TORCH_SPEC:-torch}"
}

packages() {
    before=$(torch_version $python) || fail "there is no torch: install.sh torch comes first"
    pip_install --no-deps --require-hashes --only-binary=:all: --requirement "$checkout/docker/requirements.lock"
    after=$(torch_version $python)
    [ "$before" = "$after" ] || fail "torch was $before and is $after: requirements.lock may not have it"
}

project() {
    source=$(mktemp -d) # pip writes into it, and the checkout may be mounted read-only
    for name in pyproject.toml README.md LICENSE gpt2hpc; do
        cp -R "$checkout/$name" "$source"
    done
    pip_install --no-deps --no-build-isolation "$source"
    rm -rf "$source"
    version=$($python -c 'import gpt2hpc; print(gpt2hpc.__version__)')
    [ "${VERSION:-$version}" = "$version" ] || fail "VERSION=$VERSION, and this checkout is $version"
    grep -q '^include-system-site-packages = true' $venv/pyvenv.cfg || $python -m pip check
    # Only those that lack it: a chmod of torch's files would put them into this layer too.
    find $venv ! -type l ! -perm -o=r -exec chmod a+rX {} +
}

[ $# -gt 0 ] || set -- system torch packages project
for part; do
    case $part in
    system | torch | packages | project) "$part" ;;
    *) fail "$part is none of system, torch, packages, project" ;;
    esac
done
