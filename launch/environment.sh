# shellcheck shell=bash disable=SC2034 # variables that the scripts read
# Sourced by the launch scripts: the options they share, this checkout's environment, settings that stay as they are where
# the caller has set them, and the command, which is printed before it is run.
#
# Shared options:
#   --processes N     processes on each host; default: as many as it has GPUs, else 1
#   --cpu             train on CPUs, also where there are GPUs
#   --interface NAME  the network interface that hosts use among themselves; default: the one that leads to the first host
#   --dry-run         print the command, and run nothing
#   --help            print the head of the script
#
# Variables that are set only where the caller has not: OMP_NUM_THREADS (the host's cores divided among its processes),
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (--interface), NCCL_DEBUG (WARN: errors with their reasons) and
# TORCH_CPP_LOG_LEVEL (ERROR).

checkout=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -x "$checkout/.venv/bin/python" ] || PATH=$checkout/.venv/bin:$PATH
export PATH

processes=""
cpu=0
interface=""
dry_run=0
command=train
config=""
overrides=()
settings=() # NAME=VALUE of what this script has set, for the printed command

refuse() { # MESSAGE: one line, exit code 2
    printf '%s: error: %s\n' "$(basename "$0")" "${1//[[:cntrl:]]/?}" >&2
    exit 2
}

show_help() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    sed -n '/^# Shared options/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

value_of() { # OPTION VALUE ...: sets value, and refuses an option without one
    [ $# -ge 2 ] || refuse "option $1 needs a value"
    value=$2
}

need_number() { # OPTION VALUE SMALLEST LARGEST: sets value, without leading zeros, which arithmetic would read as octal
    if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
        refuse "$1 ($2) must be a whole number from $3 to $4"
    fi
    value=$((10#$2))
}

need_host() { # OPTION VALUE: what goes into commands of other hosts and into addresses
    [[ $2 =~ ^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$ || $2 =~ ^[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*$ ]] ||
        refuse "$1 ($2) must be the name or the address of a host"
}

need_program() { # NAME REMEDY
    [ $dry_run = 1 ] || command -v "$1" >/dev/null || refuse "$1 is not installed here: $2"
}

# Reads one shared option; sets used to the number of words it took, 0 where it is none.
read_shared_option() {
    used=2
    case $1 in
        --processes)
            value_of "$@"
            need_number "$1" "$value" 1 1024
            processes=$value
            ;;
        --interface)
            value_of "$@"
            [[ $value =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || refuse "$1 ($value) must be the name of a network interface"
            interface=$value
            ;;
        --cpu) cpu=1 used=1 ;;
        --dry-run) dry_run=1 used=1 ;;
        -h | --help)
            show_help
            exit 0
            ;;
        -*) refuse "unknown option $1; options come before CONFIG, --help lists them" ;;
        *) used=0 ;;
    esac
}

# What follows the options: [train | doctor] CONFIG [SECTION.FIELD=VALUE ...]
read_run() {
    case ${1-} in
        train | doctor)
            command=$1
            shift
            ;;
    esac
    [ $# -gt 0 ] || refuse "CONFIG is missing: the YAML file of a run, e.g. configs/smoke.yaml"
    config=$1
    shift
    [ -f "$config" ] || refuse "CONFIG ($config) is not a file"
    overrides=("$@")
    local override
    for override in "$@"; do
        [[ $override =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]] ||
            refuse "'$override' is not SECTION.FIELD=VALUE; options come before CONFIG"
    done
}

num_gpus() {
    if [ $cpu = 1 ]; then
        echo 0
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^(GPU|MIG|[0-9])' || true # -1 stands for none
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else # containers may have the devices without the program
        compgen -G '/dev/nvidia[0-9]*' | grep -c . || true
    fi
}

use() { # NAME VALUE: where the caller has not set it
    if [ -z "${!1+set}" ]; then
        export "$1=$2"
        settings+=("$1=$2")
    fi
}

assign() { # NAME VALUE: whatever the caller has set
    export "$1=$2"
    settings+=("$1=$2")
}

choose_settings() { # after all options are read
    local gpus
    gpus=$(num_gpus)
    [ -n "$processes" ] || processes=$((gpus > 0 ? gpus : 1))
    if [ "$gpus" = 0 ]; then
        cpu=1
        assign CUDA_VISIBLE_DEVICES ""
    else
        use NCCL_DEBUG WARN
    fi
    local cores
    cores=$(nproc)
    use OMP_NUM_THREADS $((cores > processes ? cores / processes : 1))
    use TORCH_CPP_LOG_LEVEL ERROR # otherwise launchers print a stack trace for every connection that breaks
    if [ -n "$interface" ]; then
        use GLOO_SOCKET_IFNAME "$interface"
        use NCCL_SOCKET_IFNAME "=$interface" # without "=", also all that begin so
    fi
}

run_command() { # COMMAND ...: printed, so that it can be pasted, then run in this process' place
    local line
    line=$(printf '%q ' ${settings[@]+"${settings[@]}"} "$@")
    if [ $dry_run = 1 ]; then
        printf '%s\n' "${line% }"
        exit 0
    fi
    need_program "$1" "run bash launch/setup.sh"
    printf '%s: %s\n' "$(basename "$0" .sh)" "${line% }" >&2
    exec "$@"
}
