#!/usr/bin/env bash
# Runs a command in the image of the Dockerfile, with the flags that training needs. Docker or podman, CPU or GPU.
#
#   bash launch/docker.sh [OPTION]... smoke [cifar10] [SECTION.FIELD=VALUE]...    as launch/smoke.sh
#   bash launch/docker.sh [OPTION]... test [PYTEST ARGUMENT]...                   as launch/test.sh
#   bash launch/docker.sh [OPTION]... COMMAND [ARGUMENT]...                       any program of the image:
#
#   bash launch/docker.sh distmoe train configs/smoke.yaml
#   bash launch/docker.sh torchrun --nproc-per-node 2 -m distmoe train configs/smoke.yaml
#   bash launch/docker.sh --tensorboard tensorboard --logdir runs --host 0.0.0.0
#
# Options (--name VALUE or --name=VALUE):
#   --build              build the image first; without it, only where there is none
#   --build-arg N=VALUE  argument of the Dockerfile, with --build: BASE_IMAGE, UID, GID, DISTMOE_EXTRAS,
#                        DISTMOE_TORCH_INDEX_URL
#   --pip-conf FILE      settings of pip, such as a mirror, with --build; not kept in the image
#   --image NAME         the image (distmoe)
#   --gpu, --cpu         all GPUs, or none; default: GPUs where nvidia-smi finds one and the engine can hand it on
#   --shm-size SIZE      limit of /dev/shm (8g): NCCL and DeepSpeed exchange through it, and the engines' 64 MB are too
#                        few. Not the host's (--ipc=host): its files would outlive the container and meet others'.
#   --host-network       the host's network instead of one of its own: for training over several hosts, where
#                        rendezvous, NCCL and gloo listen on ports that cannot be named beforehand
#   --tensorboard[=PORT] opens the container's port 6006 as 127.0.0.1:PORT (6006) of this machine
#   --data DIR           folder of data, read and written (.data of this checkout)
#   --runs DIR           folder of runs (runs of this checkout)
#   --env NAME[=VALUE]   a variable for the command; nothing else of the environment gets in
#   --user UID:GID       whom files belong to (you). Where Docker itself runs without root's rights: 0:0, which is you
#   --engine-option OPT  one more option for docker run, such as --engine-option=--device=/dev/infiniband
#   --dry-run            print the commands and run nothing
#
# DISTMOE_CONTAINER_ENGINE names the engine: docker, podman or a path; default: the first of the two on the PATH.
# configs/ of this checkout is seen in the container as it is; after other changes of the checkout use --build.
# Exit codes: 2 for these options, 125 of the engine, else the command's.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly checkout
readonly APP=/opt/distmoe CACHE=/home/distmoe/.cache # as in the Dockerfile
readonly TENSORBOARD_PORT=6006
readonly STOP_TIMEOUT_S=60 # SIGTERM, then a step and a checkpoint, then SIGKILL

image=distmoe
gpu=auto
shm_size=8g
data=$checkout/.data
runs=$checkout/runs
user=$(id -u):$(id -g)
[ "$(id -u)" != 0 ] || user=${SUDO_UID:-0}:${SUDO_GID:-0}
build=no
build_options=()
network=engine
tensorboard=""
variables=()
engine_options=()
dry_run=no

fail() { # MESSAGE
    printf 'docker.sh: error: %s\n' "$1" >&2
    exit 2
}

usage() { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

matches() { # OPTION VALUE PATTERN EXAMPLE
    [[ $2 =~ ^($3)$ ]] || fail "$1 '$2' is not allowed; write it like $4"
}

absolute() { # OPTION DIR: sets folder. The engines' syntax for volumes cannot say a colon.
    [[ $2 != *:* ]] || fail "$1 '$2' contains a colon, the engine's separator; use another"
    [ ! -e "$2" ] || [ -d "$2" ] || fail "$1 '$2' is not a folder"
    folder=$(realpath -m -- "$2")
}

# Everything up to the command. Sets the variables above, and command.
parse() {
    local option value
    while [[ ${1-} == -* ]]; do
        option=${1%%=*}
        case $option in
            --build | --gpu | --cpu | --host-network | --dry-run | -h | --help)
                [ "$option" = "$1" ] || fail "$option takes no value, but is given '${1#*=}'"
                ;;
            --tensorboard) # a value only after the sign: what follows may be the command
                value=$TENSORBOARD_PORT
                [ "$option" = "$1" ] || value=${1#*=}
                ;;
            --build-arg | --pip-conf | --image | --shm-size | --data | --runs | --env | --user | --engine-option)
                if [ "$option" = "$1" ]; then
                    [ $# -ge 2 ] || fail "$option needs a value; see --help"
                    shift
                    value=$1
                else
                    value=${1#*=}
                fi
                ;;
            *) fail "unknown option $option; see --help" ;;
        esac
        shift
        case $option in
            -h | --help) usage && exit ;;
            --build) build=yes ;;
            --build-arg)
                matches "$option" "$value" '[A-Za-z_][A-Za-z0-9_]*=.*' "BASE_IMAGE=ubuntu:24.04"
                build_options+=(--build-arg "$value")
                ;;
            --pip-conf)
                [ -f "$value" ] || fail "--pip-conf '$value' is not a file"
                [[ $value != *,* ]] || fail "--pip-conf '$value' contains a comma, the engine's separator; rename it"
                build_options+=(--secret "id=pip.conf,src=$(realpath -- "$value")")
                ;;
            --image)
                matches "$option" "$value" '[a-z0-9][A-Za-z0-9_./:@-]*' "distmoe:latest"
                image=$value
                ;;
            --gpu | --cpu)
                [[ $gpu == auto || --$gpu == "$option" ]] || fail "--gpu and --cpu exclude each other; leave one out"
                gpu=${option#--}
                ;;
            --shm-size)
                matches "$option" "$value" '[1-9][0-9]*[bkmgBKMG]?' "8g"
                shm_size=$value
                ;;
            --host-network) network=host ;;
            --tensorboard)
                matches "$option" "$value" '[1-9][0-9]{0,4}' "--tensorboard=$TENSORBOARD_PORT"
                [ "$value" -le 65535 ] || fail "--tensorboard=$value is no port; use 1 to 65535"
                tensorboard=$value
                ;;
            --data) absolute "$option" "$value" && data=$folder ;;
            --runs) absolute "$option" "$value" && runs=$folder ;;
            --env)
                matches "$option" "${value%%=*}" '[A-Za-z_][A-Za-z0-9_]*' "NCCL_DEBUG=INFO, or NCCL_DEBUG for yours"
                variables+=(--env "$value")
                ;;
            --user)
                matches "$option" "$value" '[0-9]+:[0-9]+' "1000:1000"
                user=$value
                ;;
            --engine-option) engine_options+=("$value") ;;
            --dry-run) dry_run=yes ;;
        esac
    done
    [ $# -gt 0 ] || fail "no command; use smoke, test, or a program of the image such as distmoe; see --help"
    [ $build = yes ] || [ ${#build_options[@]} -eq 0 ] ||
        fail "--build-arg and --pip-conf have no effect without --build"
    [ $network = engine ] || [ -z "$tensorboard" ] ||
        fail "--tensorboard has no effect with --host-network: start tensorboard with --host 127.0.0.1 instead"
    case $1 in
        smoke | test) command=(bash "launch/$1.sh" "${@:2}") ;;
        *) command=("$@") ;;
    esac
}

find_engine() { # sets engine, and kind: docker or podman
    engine=${DISTMOE_CONTAINER_ENGINE:-docker}
    if [ -z "${DISTMOE_CONTAINER_ENGINE:-}" ] && ! command -v docker >/dev/null; then engine=podman; fi
    command -v "$engine" >/dev/null || {
        [ -z "${DISTMOE_CONTAINER_ENGINE:-}" ] ||
            fail "DISTMOE_CONTAINER_ENGINE=$engine is not a program; use docker, podman or the path of one"
        fail "neither docker nor podman is on the PATH; install one, or name it: DISTMOE_CONTAINER_ENGINE=PATH"
    }
    kind=docker
    [[ ${engine##*/} != podman* ]] || kind=podman
}

# What an engine itself looks for: Docker the toolkit's hook or a CDI specification, podman the specification.
hands_on_gpus() {
    [ $kind = docker ] && command -v nvidia-container-runtime-hook >/dev/null && return
    compgen -G '/etc/cdi/*nvidia*' >/dev/null || compgen -G '/var/run/cdi/*nvidia*' >/dev/null
}

decide_on_gpus() { # auto becomes gpu or cpu
    [ "$gpu" = auto ] || return 0
    gpu=cpu
    nvidia-smi -L >/dev/null 2>&1 || return 0
    if hands_on_gpus; then
        gpu=gpu
    else
        echo "docker.sh: GPUs are here, but $engine cannot hand them on: install the NVIDIA Container Toolkit." \
            "Going on without them; --cpu asks for that." >&2
    fi
}

run_command() { # sets run
    local label=""
    run=("$engine" run --rm --init --stop-timeout "$STOP_TIMEOUT_S" --user "$user")
    if [ -t 0 ] && [ -t 1 ]; then run+=(--interactive --tty); fi
    if [ $kind = podman ] && [ "$(id -u)" != 0 ]; then run+=(--userns keep-id); fi # else you would be another inside
    # Training needs no privilege of any kind.
    run+=(--cap-drop ALL --security-opt no-new-privileges --shm-size "$shm_size")
    if [ "$gpu" = gpu ]; then
        if [ $kind = docker ]; then run+=(--gpus all); else run+=(--device nvidia.com/gpu=all); fi
        run+=(--ulimit memlock=-1) # NCCL pins host memory
    fi
    [ $network = engine ] || run+=(--network host)
    [ -z "$tensorboard" ] || run+=(--publish "127.0.0.1:$tensorboard:$TENSORBOARD_PORT")
    if command -v selinuxenabled >/dev/null && selinuxenabled; then label=,z; fi # lets containers use the folders
    run+=(--volume "$data:$APP/.data:rw$label" --volume "$runs:$APP/runs:rw$label")
    run+=(--volume "$cache:$CACHE:rw$label" --volume "$checkout/configs:$APP/configs:ro$label")
    run+=("${variables[@]}" "${engine_options[@]}" --entrypoint "${command[0]}" "$image" "${command[@]:1}")
}

show() { # COMMAND ...: quoted for a shell
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

main() {
    parse "$@"
    find_engine
    decide_on_gpus
    # Compiled operators and the like: yours alone, since what is compiled there is also executed.
    absolute "the cache's folder" "${XDG_CACHE_HOME:-$HOME/.cache}/distmoe-container" && cache=$folder
    absolute "this checkout's folder" "$checkout"
    run_command
    local build_command=("$engine" build --tag "$image" "${build_options[@]}" "$checkout")
    if [ $dry_run = yes ]; then
        [ $build = no ] || show "${build_command[@]}"
        show "${run[@]}"
        return
    fi
    if [ $build = yes ] || ! "$engine" image inspect "$image" >/dev/null 2>&1; then
        show "${build_command[@]}" >&2
        "${build_command[@]}"
    fi
    mkdir -p -- "$data" "$runs" "$cache" # made by the engine, they would be root's
    show "${run[@]}" >&2
    exec "${run[@]}"
}

main "$@"
