#!/usr/bin/env bash
# Trains on one host or on many with accelerate launch. On several hosts: the same command on each, --host-rank aside.
#
#   bash launch/accelerate.sh [OPTIONS] CONFIG [SECTION.FIELD=VALUE]...
#   bash launch/accelerate.sh --processes 2 --cpu configs/smoke.yaml
#   bash launch/accelerate.sh --hosts 2 --host-rank 0 --master node1 configs/cifar10_topk.yaml
#
#   --hosts N          how many there are; default 1
#   --host-rank I      this one: 0 on the master, 1, 2, ... elsewhere
#   --master HOST      the first host, by a name or an address that all hosts reach
#   --port PORT        a free port there, the same on all hosts; default 29500
#   --restarts N       starts all processes again after a failure, N times at most; default 0
#
# On CPUs `accelerate launch --cpu --num_processes 2` starts one process, without a word: this starts two. What
# `accelerate config` has saved is not used: it may be of other programs, and it would win over CUDA_VISIBLE_DEVICES.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

hosts=""
master=""
host_rank=""
port=29500
restarts=0

while [ $# -gt 0 ]; do
    used=2
    case $1 in
        --hosts)
            value_of "$@"
            need_number "$1" "$value" 1 9999
            hosts=$value
            ;;
        --host-rank)
            value_of "$@"
            need_number "$1" "$value" 0 9999
            host_rank=$value
            ;;
        --master)
            value_of "$@"
            need_host "$1" "$value"
            master=$value
            ;;
        --port)
            value_of "$@"
            need_number "$1" "$value" 1 65535
            port=$value
            ;;
        --restarts)
            value_of "$@"
            need_number "$1" "$value" 0 100000
            restarts=$value
            ;;
        *) read_shared_option "$@" ;;
    esac
    [ "$used" -gt 0 ] || break
    shift "$used"
done
read_run "$@"

# Without this, a host on which --hosts was forgotten would train a model of its own.
[ -n "$hosts" ] || [ -z "$master$host_rank" ] || refuse "--master and --host-rank need --hosts: how many there are"
: "${hosts:=1}"
choose_settings
[ $cpu = 0 ] || use ACCELERATE_USE_CPU true
use DISTMOE_WORLD_SIZE $((hosts * processes))
# Precision, accumulation and the engine are distmoe's own settings; what accelerate asks for here is not used.
options=(--config_file "$checkout/launch/accelerate.yaml" --mixed_precision no --dynamo_backend no)
options+=(--num_processes $((hosts * processes)) --num_machines "$hosts")
options+=(--num_cpu_threads_per_process "$OMP_NUM_THREADS" --max_restarts "$restarts" --rdzv_backend distmoe)
if ((hosts * processes > 1)); then
    options+=(--multi_gpu) # also on CPUs: that is what starts several processes
else
    options+=(--quiet) # accelerate's own stack trace of a process that has ended says nothing
fi
if [ "$hosts" = 1 ]; then
    # Any free one. Where accelerate finds its own taken, it goes over to a rendezvous that listens on all addresses.
    options+=(--main_process_port 0)
else
    [ -n "$master" ] || refuse "--hosts ($hosts) needs --master: the name or address of the first host"
    [ -n "$host_rank" ] || refuse "--hosts ($hosts) needs --host-rank: 0 on the master, 1, 2, ... elsewhere"
    ((host_rank < hosts)) || refuse "--host-rank ($host_rank) must be below --hosts ($hosts)"
    options+=(--machine_rank "$host_rank" --main_process_ip "$master" --main_process_port "$port")
    options+=(--rdzv_conf "rank=$host_rank")
fi
run_command accelerate launch "${options[@]}" --module distmoe "$command" "$config" ${overrides[@]+"${overrides[@]}"}
