#!/usr/bin/env bash
# Proves the Dockerfile and the README's first two commands in fresh Debian roots, where no container engine runs:
#
#   bash tests/launch/fresh_root.sh              both proofs, then a table of the seconds that every step took
#   bash tests/launch/fresh_root.sh image        the Dockerfile's own instructions (dockerfile_steps.py), then the two
#                                                commands and more as its user and as another
#   bash tests/launch/fresh_root.sh checkout     the two commands as root of a machine that has nothing but the checkout
#
# A root is made by debootstrap (variant minbase) and taken for the Dockerfile's base image. What reaches it from
# outside is what this machine is set to use, read at run time: apt's sources and options, pip's settings and the local
# folders that they name (bound read-only), CA certificates, proxy variables. The checkout is what git keeps or would
# keep.
# Everything runs in mount and process namespaces of its own and is gone afterwards. Needs root and 20 GB in TMPDIR.
# Exit code 77: this machine cannot do it, for the reason that is printed.
set -euo pipefail

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly CHECKOUT
readonly BASE=debian:bookworm-slim SUITE=bookworm
readonly SHM_SIZE=8g     # as launch/docker.sh
readonly OTHER=4321:4321 # a user that the image does not know
readonly NEEDED_GB=20
readonly CA_CERTIFICATES=/etc/ssl/certs/ca-certificates.crt

say() { printf '\n### %s\n' "$*"; }

skip() { # REASON
    printf 'fresh_root.sh: cannot run here: %s\n' "$1" >&2
    exit 77
}

now() { printf '%s' "${EPOCHREALTIME/[.,]/}"; } # microseconds

timed() { # TITLE COMMAND ...: runs it and adds its line to the report
    local title=$1 started
    started=$(now)
    shift
    say "$title"
    "$@"
    awk -v title="$title" -v us=$(($(now) - started)) 'BEGIN { printf "%.1f\t%s\n", us / 1e6, title }' >>"$WORK/report"
}

megabytes() { du -smx "$1" | cut -f1; }

# -------------------------------------------------------------------------------- what this machine is set to use

apt_sources() { # the lines for this suite's own archives, whatever form and file they are written in here
    apt-get indextargets --format "\$(REPO_URI) \$(RELEASE) \$(COMPONENT)" 'Created-By: Packages' |
        awk -v suites="^$SUITE(-updates|-security)?$" '$2 ~ suites && $3 == "main" { print "deb", $1, $2, $3 }' |
        sort -u
}

apt_options() { apt-config dump Acquire | grep -vE '^Acquire::(IndexTargets|Changelogs)'; }

pip_settings() { # one pip.conf of all that pip reads here, files and environment; a later section wins
    local settings section
    settings=$(python3 -m pip config list)
    echo "[global]"
    for section in global install :env:; do
        sed -nE "s/^$section\.\.?([a-z-]+)='(.*)'\$/\1 \2/p" <<<"$settings"
    done | awk -v ca=$CA_CERTIFICATES.host '
        { key = $1; sub(/^[^ ]+ /, ""); gsub(/\\n/, " "); value[key] = key == "cert" ? ca : $0 }
        END { for (key in value) print key, "=", value[key] }'
}

named_paths() { # -d or -f: the folders or files that pip's settings name; an index also needs what lies beside it
    grep -oE '(file://)?/[^ ]+' "$WORK/pip.conf" | sed 's#^file://##; s#/simple/*$##' | sort -u | while read -r path; do
        if test "$1" "$path"; then echo "$path"; fi
    done
}

proxies() { env | grep -iE '^(http|https|no)_proxy=' || true; }

# ------------------------------------------------------------------------------------------------------- the roots

debian() { # makes the base that both roots start from
    local mirror
    mirror=$(awk -v suite=$SUITE '$3 == suite { print $2; exit }' "$WORK/sources.list")
    if ! debootstrap --variant=minbase $SUITE "$WORK/base" "$mirror" >"$WORK/debootstrap.log" 2>&1; then
        tail -n 5 "$WORK/debootstrap.log" >&2
        skip "debootstrap failed (see above)"
    fi
    rm -f "$WORK"/base/var/cache/apt/archives/*.deb
    cp "$WORK/sources.list" "$WORK/base/etc/apt/sources.list"
    cp "$WORK/apt.conf" "$WORK/base/etc/apt/apt.conf.d/99host"
    [ ! -f $CA_CERTIFICATES ] || install -D -m 644 $CA_CERTIFICATES "$WORK/base$CA_CERTIFICATES.host"
    named_paths -f | while read -r file; do install -D -m 644 "$file" "$WORK/base$file"; done
}

open_root() { # NAME: a copy of the base with what a container or a machine has mounted
    local root=$WORK/$1 device
    cp -a "$WORK/base" "$root"
    cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t tmpfs -o mode=755,size=1m tmpfs "$root/dev"
    for device in null zero full random urandom tty; do
        touch "$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    done
    ln -s /proc/self/fd "$root/dev/fd"
    ln -s fd/0 "$root/dev/stdin"
    ln -s fd/1 "$root/dev/stdout"
    ln -s fd/2 "$root/dev/stderr"
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    mount -t tmpfs -o "mode=1777,size=$SHM_SIZE" tmpfs "$root/dev/shm"
    named_paths -d | while read -r folder; do
        mkdir -p "$root$folder"
        mount --bind "$folder" "$root$folder"
        mount -o remount,bind,ro "$root$folder"
    done
}

mounts_below() { # FOLDER: the last one mounted first
    awk -v folder="$1/" 'index($2, folder) == 1 { print $2 }' /proc/self/mounts | tac
}

close_root() { # NAME APP: what it holds, in MB, and away with it
    local root=$WORK/$1
    mounts_below "$root" | xargs --no-run-if-empty -n 1 umount
    printf '%d\t%s\n' "$(megabytes "$root")" "$1: all of it, of which" \
        "$(megabytes "$root/$2/.venv")" "$1:   $2/.venv" >>"$WORK/sizes"
    [ -z "$(mounts_below "$root")" ] && rm -rf "$root" # what is bound there must not go with it
}

wheels() { # SETUP_LOG: where pip got what it installed
    printf "pip: %d packages from this machine's disk, %d over the network, %d of them built from source\n" \
        "$(grep -cE '^ *Processing /' "$1")" "$(grep -cE '^ *Downloading [^ ]+\.(whl|tar\.gz)' "$1")" \
        "$(grep -E '^ *Created wheel for ' "$1" | grep -vc editable)"
}

steps() { (cd "$WORK/context" && PYTHONDONTWRITEBYTECODE=1 python3 -m tests.launch.dockerfile_steps "$@"); }

container() { # ARGUMENT ... of dockerfile_steps.py run; like every container it finds the home that the image has
    rm -rf "$WORK/image/home"
    cp -a "$WORK/home" "$WORK/image/home"
    steps run "$@"
}

in_image() { container --entrypoint bash "$WORK/image" -c "$1"; }

image() {
    local arguments=() proxy app=$WORK/image/opt/distmoe
    while read -r proxy; do [ -z "$proxy" ] || arguments+=(--build-arg "$proxy"); done < <(proxies)
    open_root image
    say "image: the Dockerfile, from $BASE"
    steps build "$WORK/image" "$WORK/context" --base $BASE --report "$WORK/report" \
        --secret "pip.conf=$WORK/pip.conf" "${arguments[@]}"
    wheels "$app/.venv/setup.log"
    cp -a "$WORK/image/home" "$WORK/home"
    printf 'sources compiled: %d of %d\n' "$(find "$app/distmoe" -name '*.pyc' | wc -l)" \
        "$(find "$app/distmoe" -name '*.py' | wc -l)"
    timed "image: bash launch/smoke.sh" in_image 'bash launch/smoke.sh'
    timed "image: python -m distmoe plan configs/smoke.yaml" \
        in_image 'source .venv/bin/activate && python -m distmoe plan configs/smoke.yaml'
    timed "image: no arguments" container "$WORK/image"
    timed "image: train, as user $OTHER" container --user $OTHER "$WORK/image" train configs/smoke.yaml \
        run.name=other train.max_steps=20
    timed "image: torchrun, 2 processes, experts sharded, as user $OTHER" container --user $OTHER --entrypoint \
        /opt/distmoe/.venv/bin/torchrun "$WORK/image" --nproc-per-node 2 -m distmoe train configs/smoke.yaml \
        run.name=sharded train.max_steps=20 parallel.expert_parallel_size=2 parallel.zero_stage=1 parallel.timeout_s=120
    timed "image: launch/test.sh with one file of tests, as user $OTHER" container --user $OTHER --entrypoint bash \
        "$WORK/image" launch/test.sh tests/unit/test_containers.py
    say "image: what lies in its home folder"
    find "$WORK/home/distmoe" -mindepth 1 -printf '%U:%G %m %P\n' | sort | head -n 20
    say "image: who owns what was written"
    find "$app/runs" -mindepth 1 -maxdepth 1 -printf '%U:%G %f\n' | sort
    close_root image opt/distmoe
}

in_checkout() {
    local variables=()
    mapfile -t variables < <(proxies)
    variables+=(HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
    chroot "$WORK/checkout" /usr/bin/env -i --chdir=/root/distmoe "${variables[@]}" bash -c "$1" </dev/null
}

checkout() {
    local app=$WORK/checkout/root/distmoe
    open_root checkout
    cp "$WORK/pip.conf" "$WORK/checkout/etc/pip.conf"
    cp -a "$WORK/context" "$app"
    timed "checkout: bash launch/smoke.sh, nothing installed" in_checkout 'bash launch/smoke.sh'
    wheels "$app/.venv/setup.log"
    timed "checkout: python -m distmoe plan configs/smoke.yaml" \
        in_checkout 'source .venv/bin/activate && python -m distmoe plan configs/smoke.yaml'
    timed "checkout: bash launch/setup.sh, nothing to do" in_checkout 'bash launch/setup.sh'
    close_root checkout root/distmoe
}

inside() { # PROOF ...: in the namespaces; WORK is the folder to use
    local proof
    unset TMPDIR # a folder out here: programs inside would look for it
    apt_sources >"$WORK/sources.list"
    [ -s "$WORK/sources.list" ] || skip "apt's sources here have no $SUITE"
    apt_options >"$WORK/apt.conf"
    pip_settings >"$WORK/pip.conf"
    say "taken from this machine"
    printf 'apt sources: %s\n' "$(cut -d' ' -f3 "$WORK/sources.list" | paste -sd' ')"
    printf 'pip settings: %s\n' "$(sed -n 's/ = .*//p' "$WORK/pip.conf" | sort | paste -sd' ')"
    printf 'local folders of packages: %d, proxies: %d\n' "$(named_paths -d | wc -l)" "$(proxies | wc -l)"
    mkdir "$WORK/context"
    tar -C "$CHECKOUT" --null --files-from="$WORK/files" -cf - | tar -C "$WORK/context" --no-same-owner -xf -
    : >"$WORK/report"
    timed "debootstrap, $SUITE, minbase" debian
    printf '%d\t%s\n' "$(megabytes "$WORK/base")" "base system" >"$WORK/sizes"
    for proof in "$@"; do "$proof"; done
    printf '\nload average now %s, %s cores\n' "$(cut -d' ' -f1 /proc/loadavg)" "$(nproc)"
    printf '\n%8s  %s\n' seconds step
    awk -F'\t' '{ printf "%8.1f  %s\n", $1, substr($2, 1, 110) }' "$WORK/report"
    printf '\n%8s  %s\n' MB what
    awk -F'\t' '{ printf "%8d  %s\n", $1, $2 }' "$WORK/sizes"
}

main() {
    local proofs=("$@") proof tool free_gb
    [ $# -gt 0 ] || proofs=(image checkout)
    for proof in "${proofs[@]}"; do
        [[ $proof == image || $proof == checkout ]] || {
            echo "fresh_root.sh: unknown proof '$proof'; use image or checkout" >&2
            exit 2
        }
    done
    [ "$(id -u)" = 0 ] || skip "needs root"
    for tool in debootstrap unshare chroot apt-get git python3; do
        command -v $tool >/dev/null || skip "$tool is missing"
    done
    unshare --mount --pid --fork true 2>/dev/null || skip "no namespaces for mounts and processes"
    git -C "$CHECKOUT" rev-parse 2>/dev/null || skip "$CHECKOUT is no git checkout"
    free_gb=$(df -BG --output=avail "${TMPDIR:-/tmp}" | tail -n 1 | tr -dc 0-9)
    [ "$free_gb" -ge $NEEDED_GB ] || skip "${TMPDIR:-/tmp} has $free_gb GB free, fewer than $NEEDED_GB"

    WORK=$(mktemp -d "${TMPDIR:-/tmp}/fresh-root.XXXXXX")
    git -C "$CHECKOUT" ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        if [ -e "$CHECKOUT/$file" ]; then printf '%s\0' "$file"; fi
    done >"$WORK/files"
    # The mounts exist in the namespace alone: once its first process is gone, there is nothing to unmount, and removing
    # the folder out here cannot reach what was bound inside.
    WORK=$WORK unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        bash "${BASH_SOURCE[0]}" --inside "${proofs[@]}" &
    child=$! # not local: the trap outlives this function
    trap 'kill -KILL $child 2>/dev/null || true; wait $child 2>/dev/null || true; rm -rf --one-file-system "$WORK"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    wait $child
}

case ${1-} in
    --inside) inside "${@:2}" ;;
    *) main "$@" ;;
esac
