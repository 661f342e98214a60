#!/usr/bin/env bash
# Sets the checkout up (launch/setup.sh) and runs every quality gate: format, lint, types, tests.
# Arguments go to pytest: bash launch/test.sh tests/unit -k gates
#
# Tests on real data look into DISTMOE_DATA_ROOT (default .data) and are skipped, with the reason, where a set is absent.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${DISTMOE_EXTRAS-ffcv,deepspeed}
for extra in dev peers; do # the gates themselves, and what some tests compare with
    [[ ",$extras," == *",$extra,"* ]] || extras=${extras:+$extras,}$extra
done
DISTMOE_EXTRAS=$extras bash launch/setup.sh

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
# One thread each: small products on several threads wait for each other more than they work.
gate tests env OMP_NUM_THREADS=1 python -m pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf '\n%d of 4 gates failed: %s\n' ${#failed[@]} "${failed[*]}" >&2
    exit 1
fi
printf '\nall 4 gates passed in %d s\n' "$SECONDS"
