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
# password from here, and bash, zsh or ksh as the log-in shell. Of this environment only what this script sets is sent.
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
            [ -f "$value" ] || refuse "--hostfile ($value) is not a file"
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
        [[ $line =~ ^([A-Za-z0-9][A-Za-z0-9._-]*)[[:space:]]+slots=([1-9][0-9]{0,3})[[:space:]]*$ ]] ||
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
# Here everything but plain characters becomes \xNN inside $'...', which leaves neither space, quote nor anything to expand.
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
            printf -v code '\\x%02x' $((code & 255)) # bytes above 127 come as negative numbers
            quoted+=$code
        fi
    done
    quoted+="'"
}

[ -z "$hostfile" ] || read_hosts
choose_settings
[ $cpu = 0 ] || use DS_ACCELERATOR cpu
use DISTMOE_WORLD_SIZE $((processes * (${#hosts[@]} > 0 ? ${#hosts[@]} : 1)))
options=(--module --no_local_rank --master_port "$port")
arguments=("$command" "$config" ${overrides[@]+"${overrides[@]}"})
if [ -z "$hostfile" ]; then # deepspeed would look for /job/hostfile
    run_command deepspeed --num_gpus "$processes" --hostfile /dev/null/none "${options[@]}" distmoe "${arguments[@]}"
fi

[[ $PWD$checkout =~ ^[A-Za-z0-9_./@+-]+$ ]] ||
    refuse "the path $PWD has characters that remote shells read as something else: move the checkout"
[ $dry_run = 1 ] || command -v pdsh >/dev/null || refuse "pdsh is not installed here: apt-get install pdsh"
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
shared='^(OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|DS_ACCELERATOR|DISTMOE_WORLD_SIZE|GLOO_[A-Z_]+|NCCL_[A-Z0-9_]+)$'
withheld=()
while IFS= read -r name; do
    if [[ $name =~ $shared ]]; then
        [[ ${!name} =~ ^[A-Za-z0-9_.,:=/+-]*$ ]] || refuse "environment variable $name (${!name}) cannot be sent to other hosts"
        printf '%s=%s\n' "$name" "${!name}" >&8
    fi
    [[ ! $name =~ ^(MLFLOW|PYTHON|MV2|UCX|NCCL) ]] || withheld+=(-u "$name")
done < <(compgen -e)
exec 8>&-
# --force_multi: of a file with one host, deepspeed would start the processes here whatever its name is.
options+=(--hostfile "$hostfile" --launcher pdsh --force_multi --master_addr "${master:-${hosts[0]}}")
[ -z "$ssh_port" ] || options+=(--ssh_port "$ssh_port")
run_command env ${withheld[@]+"${withheld[@]}"} DS_ENV_FILE=/dev/fd/9 deepspeed "${options[@]}" distmoe "${arguments[@]}"
