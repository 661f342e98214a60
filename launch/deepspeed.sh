#!/usr/bin/env bash
# Trains with the deepspeed launcher: on this host, or from this host on all hosts of a file, over ssh and pdsh.
#
#   bash launch/deepspeed.sh [OPTIONS] CONFIG [SECTION.FIELD=VALUE]...
#   bash launch/deepspeed.sh --processes 2 --cpu configs/smoke.yaml
#   bash launch/deepspeed.sh --hostfile hostfile configs/cifar10_topk.yaml
#
#   --hostfile FILE    lines `HOST slots=N`, as many slots on every host; launch/hostfile.example
#   --master HOST      the first host of the file, by a name or an address that all reach; default: as the file names it
#   --port PORT        a free port there; default 29500
#   --ssh-port PORT    of ssh on all hosts
#
# Every host needs this checkout and its .venv at the same path, the run's folder on storage that all share, ssh without a
# password from here, and bash, zsh or ksh as the log-in shell. Of this environment they get what this script sets, and
# NCCL_* and GLOO_*; .deepspeed_env is not read.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

hostfile=""
master=""
port=29500
ssh_port=""

while [ $# -gt 0 ]; do
    used=2
    case $1 in
        --hostfile)
            value_of "$@"
            [[ -f $value && -r $value ]] || refuse "--hostfile ($value) is not a file that can be read"
            hostfile=$value
            ;;
        --master)
            value_of "$@"
            need_host "$1" "$value"
            master=$value
            ;;
        --port | --ssh-port)
            value_of "$@"
            need_number "$1" "$value" 1 65535
            if [ "$1" = --port ]; then port=$value; else ssh_port=$value; fi
            ;;
        *) read_shared_option "$@" ;;
    esac
    [ "$used" -gt 0 ] || break
    shift "$used"
done
read_run "$@"

hosts=()
read_hosts() { # deepspeed hands names to ssh and pdsh, which read more into them than names
    local line number=0 slots=""
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line=${line%%#*}
        [[ $line =~ [^[:space:]] ]] || continue
        [[ $line =~ ^[[:space:]]*([A-Za-z0-9][A-Za-z0-9._-]*)[[:space:]]+slots=([1-9][0-9]{0,3})[[:space:]]*$ ]] ||
            refuse "$hostfile, line $number ($line) must be: HOST slots=N"
        [[ " ${hosts[*]-} " != *" ${BASH_REMATCH[1]} "* ]] || refuse "$hostfile, line $number: host ${BASH_REMATCH[1]} is there twice"
        [ -z "$slots" ] || [ "$slots" = "${BASH_REMATCH[2]}" ] ||
            refuse "$hostfile, line $number: ${BASH_REMATCH[2]} slots, $slots above; every host must have as many processes"
        hosts+=("${BASH_REMATCH[1]}")
        slots=${BASH_REMATCH[2]}
    done <"$hostfile"
    [ ${#hosts[@]} -gt 0 ] || refuse "$hostfile names no host: lines must be HOST slots=N"
    [ -z "$processes" ] || [ "$processes" = "$slots" ] || refuse "--processes ($processes) and slots=$slots in $hostfile differ"
    processes=$slots
}

# deepspeed puts arguments into the command of a remote shell as they are, or between double quotes if there is a space.
# Here everything but plain characters becomes \NNN inside $'...', which leaves neither space, quote nor anything to
# expand. Octal: in ksh, the digits of \xNN do not end before the next letter from a to f.
for_remote_shell() { # ARGUMENT: sets quoted
    local LC_ALL=C index character code
    quoted=$1
    [[ $1 =~ ^[A-Za-z0-9_.,:=/+-]+$ ]] && return
    quoted="\$'"
    for ((index = 0; index < ${#1}; index++)); do
        character=${1:index:1}
        if [[ $character =~ [A-Za-z0-9_.,:=/+-] ]]; then
            quoted+=$character
        else
            printf -v code %d "'$character"
            printf -v code '\\%03o' $((code & 255)) # bytes above 127 come as negative numbers
            quoted+=$code
        fi
    done
    quoted+="'"
}

if [ -n "$hostfile" ]; then
    read_hosts
    if [ $cpu = 0 ] && [ "$(num_gpus)" = 0 ]; then
        refuse "there is no GPU on this host, by which all are judged: add --cpu to train on CPUs on all of them"
    fi
else # on a host on which --hostfile was forgotten, a model of its own would be trained
    [ -z "$master$ssh_port" ] || refuse "--master and --ssh-port need --hostfile: the file with all hosts"
fi
choose_settings
[ $cpu = 0 ] || use DS_ACCELERATOR cpu
use DISTMOE_WORLD_SIZE $((processes * (${#hosts[@]} > 0 ? ${#hosts[@]} : 1)))
options=(--no_local_rank --master_port "$port")
arguments=("$command" "$config" ${overrides[@]+"${overrides[@]}"})
if [ $cpu = 0 ]; then
    options+=(--module)
    program=distmoe
else # deepspeed sets CUDA_VISIBLE_DEVICES on CPUs too, which would bring the GPUs back
    options+=(--no_python)
    program="env"
    arguments=(CUDA_VISIBLE_DEVICES= "$(command -v python || echo python)" -u -m distmoe "${arguments[@]}")
fi
if [ -z "$hostfile" ]; then
    devices=(--num_gpus "$processes")
    if [ $cpu = 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # with --num_gpus, deepspeed would take the first ones
        [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] ||
            refuse "CUDA_VISIBLE_DEVICES ($CUDA_VISIBLE_DEVICES) must be numbers of GPUs: deepspeed knows no other names"
        devices=(--include "localhost:$(cut -d , -f "1-$processes" <<<"$CUDA_VISIBLE_DEVICES")")
    fi
    # Without a file, deepspeed would look for /job/hostfile.
    run_command deepspeed "${devices[@]}" --hostfile /dev/null/none "${options[@]}" "$program" "${arguments[@]}"
fi

first_gpus=$(seq -s , 0 $((processes - 1)))
if [ $cpu = 0 ] && [ "${CUDA_VISIBLE_DEVICES-$first_gpus}" != "$first_gpus" ]; then
    refuse "CUDA_VISIBLE_DEVICES ($CUDA_VISIBLE_DEVICES): with a hostfile, deepspeed takes the first $processes GPUs; unset it"
fi
folder=$(pwd -P) # where the remote shells go
[[ $folder$checkout =~ ^[A-Za-z0-9_./@+-]+$ ]] ||
    refuse "the path $folder or $checkout has characters that remote shells read as something else: move the checkout"
need_program deepspeed "run bash launch/setup.sh"
need_program pdsh "apt-get install pdsh"
need_program ssh "apt-get install openssh-client"
for index in "${!arguments[@]}"; do
    for_remote_shell "${arguments[index]}"
    arguments[index]=$quoted
done

# What the other hosts get of this environment; deepspeed reads it from a file, which is gone but for our handle of it.
# It would also send all variables that begin with MLFLOW, PYTHON, MV2, UCX or NCCL, and print them.
sent=$(mktemp "${TMPDIR:-/tmp}/distmoe-environment.XXXXXX")
exec 8>"$sent"
exec 9<"$sent"
rm -f "$sent"
shared='^(OMP_NUM_THREADS|DS_ACCELERATOR|DISTMOE_WORLD_SIZE|GLOO_[A-Z_]+|NCCL_[A-Z0-9_]+)$'
withheld=()
while IFS= read -r -d '' variable; do # of env, since bash does not know all names: a.b is none to it
    name=${variable%%=*} value=${variable#*=}
    if [[ $name =~ $shared ]]; then
        [[ $value =~ ^[A-Za-z0-9_.,:=/+^-]*$ ]] || refuse "environment variable $name ($value) cannot be sent to other hosts"
        printf '%s=%s\n' "$name" "$value" >&8
    fi
    [[ ! $name =~ ^(MLFLOW|PYTHON|MV2|UCX|NCCL) ]] || withheld+=(-u "$name")
done < <(env -0)
exec 8>&-
# --force_multi: of a file with one host, deepspeed would start the processes here whatever its name is.
options+=(--hostfile "$hostfile" --launcher pdsh --force_multi --master_addr "${master:-${hosts[0]}}")
[ -z "$ssh_port" ] || options+=(--ssh_port "$ssh_port")
run_command env ${withheld[@]+"${withheld[@]}"} DS_ENV_FILE=/dev/fd/9 deepspeed "${options[@]}" "$program" "${arguments[@]}"
