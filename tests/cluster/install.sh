#!/bin/sh
# What the tests on a real Slurm need beside Python, from Debian's or Ubuntu's packages; or what is named, as PROGRAM:PACKAGE. Where it
# cannot install, it says so and leaves it to the tests to skip.
set -eu

[ $# -gt 0 ] || set -- slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge shellcheck:shellcheck tc:iproute2
missing=
for pair; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed:$missing; as root on Debian or Ubuntu, make test does that. Tests that need them are skipped." >&2
    exit 0
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # a list of words
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; } ||
    echo "could not install$missing; tests that need them are skipped" >&2
