#!/usr/bin/env bash
# Trains on one host or on many with torchrun. On several hosts: the same command on each of them.
#
#   bash launch/torchrun.sh [OPTIONS] CONFIG [SECTION.FIELD=VALUE]...
#   bash launch/torchrun.sh --processes 2 --cpu configs/smoke.yaml
#   bash launch/torchrun.sh --hosts 2 --master node1 configs/cifar10_topk.yaml
#   bash launch/torchrun.sh --hosts 1:4 --master node1 --restarts 10 configs/cifar10_topk.yaml
#   bash launch/torchrun.sh --processes 2 doctor configs/smoke.yaml       look at the ranks instead of training
#
#   --hosts N | MIN:MAX  hosts; with MIN:MAX a run goes on with those that are there, and takes in others that come
#   --master HOST[:PORT] the first host, by a name or an address that all hosts reach ([...] around an IPv6 one), and a
#                        free port there; default 29400. It must outlive the run.
#   --host-rank I        fixes the ranks of hosts: 0 on the master, 1, 2, ... elsewhere; not with MIN:MAX
#   --restarts N         starts all processes again after a failure, N times at most; default 0, with MIN:MAX 3
#   --id NAME            tells runs with one master from each other, the same on all hosts; default distmoe
#   --rendezvous K=V,... settings of torchrun's rendezvous, e.g. last_call_timeout=10,join_timeout=300
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

hosts=""
master=""
host_rank=""
fewest=1
most=1
restarts=""
id=distmoe
rendezvous=""

while [ $# -gt 0 ]; do
    used=2
    case $1 in
        --hosts)
            value_of "$@"
            [[ $value =~ ^([0-9]{1,4}):([0-9]{1,4})$ || $value =~ ^([0-9]{1,4})()$ ]] ||
                refuse "--hosts ($value) must be a whole number, or MIN:MAX"
            fewest=$((10#${BASH_REMATCH[1]}))
            most=$((10#${BASH_REMATCH[2]:-$fewest}))
            ((1 <= fewest && fewest <= most)) || refuse "--hosts ($value) must be at least 1, and MIN at most MAX"
            hosts=$fewest
            [ "$fewest" = "$most" ] || hosts=$fewest:$most
            ;;
        --master)
            value_of "$@"
            master=$value
            [[ $value =~ ^(\[([0-9A-Fa-f:.]+)\]|[^]:[]+)(:([0-9]+))?$ ]] ||
                refuse "--master ($value) must be HOST or HOST:PORT, with [...] around an IPv6 address"
            endpoint=("${BASH_REMATCH[@]}")
            need_host "$1" "${endpoint[2]:-${endpoint[1]}}"
            [ -z "${endpoint[3]}" ] || need_number "the port in --master" "${endpoint[4]}" 1 65535
            ;;
        --host-rank)
            value_of "$@"
            need_number "$1" "$value" 0 9999
            host_rank=$value
            ;;
        --restarts)
            value_of "$@"
            need_number "$1" "$value" 0 100000
            restarts=$value
            ;;
        --id)
            value_of "$@"
            [[ $value =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || refuse "--id ($value) must be letters, digits, '.', '_' and '-'"
            id=$value
            ;;
        --rendezvous)
            value_of "$@"
            [[ $value =~ ^[a-z_]+=[A-Za-z0-9.]+(,[a-z_]+=[A-Za-z0-9.]+)*$ ]] || refuse "--rendezvous ($value) must be K=V,..."
            rendezvous=$value
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
if [ "$most" -gt 1 ] && [ -z "$master" ]; then
    refuse "--hosts ($hosts) needs --master: the name or address of the first host"
fi
if [ -n "$host_rank" ]; then
    [ "$fewest" = "$most" ] || refuse "--host-rank ($host_rank) fixes the hosts, --hosts ($hosts) leaves them open: drop one"
    ((host_rank < most)) || refuse "--host-rank ($host_rank) must be below --hosts ($hosts)"
    rendezvous="rank=$host_rank${rendezvous:+,$rendezvous}"
fi
if [ "$fewest" != "$most" ]; then
    : "${restarts:=3}"
    # A host that is gone is given up after 10 s, and who is left waits 10 s for others: torch's own 15 s and 30 s.
    rendezvous="keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=10${rendezvous:+,$rendezvous}"
fi
if [ "$most" = 1 ]; then
    : "${master:=127.0.0.1:0}" # any free port, seen by this host only
fi

choose_settings
[ "$fewest" != "$most" ] || use DISTMOE_WORLD_SIZE $((most * processes))
options=(--nnodes "$hosts" --nproc-per-node "$processes" --max-restarts "${restarts:-0}")
options+=(--rdzv-backend distmoe --rdzv-endpoint "$master" --rdzv-id "$id")
[ -z "$rendezvous" ] || options+=(--rdzv-conf "$rendezvous")
run_command torchrun "${options[@]}" --module distmoe "$command" "$config" ${overrides[@]+"${overrides[@]}"}
