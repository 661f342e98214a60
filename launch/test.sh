#!/usr/bin/env bash
# Sets the checkout up (launch/setup.sh) and runs every quality gate: format, lint, types, shell, dockerfile, tests.
# Arguments go to pytest: bash launch/test.sh tests/unit -k gates
#
# Tests on real data look into DISTMOE_DATA_ROOT (default .data) and are skipped, with the reason, where a set is absent.
# Tests of launchers imitate several hosts, with sshd and Slurm. What they need is installed where nothing can be disturbed:
# as root, with apt, on a machine without systemd (a container), or where DISTMOE_HOST_TESTS=1; elsewhere they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${DISTMOE_EXTRAS-ffcv,deepspeed}
for extra in dev peers; do # the gates themselves, and what some tests compare with
    [[ ",$extras," == *",$extra,"* ]] || extras=${extras:+$extras,}$extra
done
DISTMOE_EXTRAS=$extras bash launch/setup.sh

host_programs() { # programs and their packages, on Debian 12 and Ubuntu 24.04
    { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; } || return 0
    [ ! -d /run/systemd/system ] || [ "${DISTMOE_HOST_TESTS:-0}" = 1 ] || return 0
    local missing=() program package
    while read -r program package; do
        command -v "$program" >/dev/null || missing+=("$package")
    done <<'END'
ip iproute2
nsenter util-linux
iptables iptables
ssh openssh-client
sshd openssh-server
pdsh pdsh
munged munge
slurmctld slurmctld
slurmd slurmd
srun slurm-client
END
    [ ${#missing[@]} -gt 0 ] || return 0
    printf 'test: system packages for tests on several hosts: %s\n' "${missing[*]}"
    # RUNLEVEL=1: their daemons are not started. Without them, tests are skipped and say why.
    {
        apt-get update &&
            RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
    } >/dev/null 2>&1 </dev/null || printf 'test: they cannot be installed\n'
}
host_programs

PATH=$PWD/.venv/bin:$PATH # the launchers that tests start are those of this environment
export PATH
failed=()

gate() { # NAME COMMAND ...: every gate runs, so that one run shows all there is to mend
    local name=$1 started=$SECONDS verdict=passed
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || {
        verdict=FAILED
        failed+=("$name")
    }
    printf '== %s %s in %d s\n' "$name" "$verdict" $((SECONDS - started))
}

gate format python -m ruff format --check .
gate lint python -m ruff check .
gate types python -m mypy
gate shell shellcheck -x launch/*.sh launch/slurm.sbatch tests/launch/*.sh .ci/run
gate dockerfile hadolint Dockerfile
# One thread each: small products on several threads wait for each other more than they work.
gate tests env OMP_NUM_THREADS=1 python -m pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf '\n%d of 6 gates failed: %s\n' ${#failed[@]} "${failed[*]}" >&2
    exit 1
fi
printf '\nall 6 gates passed in %d s\n' "$SECONDS"
