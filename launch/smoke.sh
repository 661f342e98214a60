#!/usr/bin/env bash
# From nothing to a trained mixture of experts in one CPU process: sets the checkout up, trains, says where to look.
#
#   bash launch/smoke.sh                             the built-in synthetic set, no download
#   bash launch/smoke.sh cifar10 [SECTION.FIELD=VALUE]...   CIFAR-10: found under data.root, else downloaded
#
# On the synthetic set one expert is trained alone, for comparison. Further arguments change the configuration.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=synthetic
case ${1-} in
    '' | *=*) ;;
    synthetic | cifar10)
        data=$1
        shift
        ;;
    *)
        echo "smoke.sh: unknown data set '$1'; use synthetic or cifar10" >&2
        exit 2
        ;;
esac

bash launch/setup.sh
PATH=$PWD/.venv/bin:$PATH
export PATH
stamp=$(date +%Y%m%d-%H%M%S)

accuracy() { python -c 'import json, sys; print(f"{json.load(open(sys.argv[1]))[sys.argv[2]]:.4f}")' "$1/summary.json" "$2"; }
folder() { # the run.dir that applies: the last override of it, else the default
    local dir=runs argument
    for argument in "$@"; do [[ $argument == run.dir=* ]] && dir=${argument#run.dir=}; done
    echo "$dir"
}

if [ "$data" = cifar10 ]; then
    config=configs/cifar10_topk.yaml
    python -m distmoe prepare "$config" "$@"
else
    config=configs/smoke.yaml
fi
run=$(folder "$@")/smoke-$data-$stamp
python -m distmoe train "$config" "run.name=$(basename "$run")" "$@"
if [ "$data" = synthetic ]; then
    single=$run-one-expert
    python -m distmoe train "$config" "run.name=$(basename "$single")" moe=null "$@"
    printf '\ntest accuracy on the synthetic set: mixture %s, one expert %s\n' \
        "$(accuracy "$run" test_accuracy)" "$(accuracy "$single" test_accuracy)"
else
    printf '\ntest accuracy on CIFAR-10: %s\n' "$(accuracy "$run" test_accuracy)"
fi
cat <<END

checkpoints   $run/checkpoints
TensorBoard   .venv/bin/tensorboard --logdir $run/tensorboard
next          .venv/bin/python -m distmoe evaluate $run
END
