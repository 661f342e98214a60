#!/usr/bin/env bash
# Sets this checkout up in .venv: system packages, Python packages with exact versions, distmoe itself (editable).
# Safe to run again: when nothing has changed it only checks and ends at once.
#
#   bash launch/setup.sh                    everything; asks for root's rights only if system packages are missing
#   bash launch/setup.sh system-packages    only those, of which an image has a layer: the rest needs no such rights
#
# Settings (environment variables, all optional):
#   PYTHON                   the interpreter to build .venv from (3.11 or 3.12); default: the first that works of
#                            python3.12, python3.11, python3
#   DISTMOE_EXTRAS           extras of pyproject.toml to install; default "ffcv,deepspeed,dev" (also there: peers); "" = none
#   DISTMOE_WITHOUT_FFCV     1 = go on without FFCV and its system packages; train with data.loader=resident
#   DISTMOE_TORCH_INDEX_URL  another wheel index for torch and torchvision: CPU-only, or another CUDA version
#   DISTMOE_CONSTRAINTS      another file of exact versions instead of launch/constraints.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly VENV_PYTHON=$VENV/bin/python
readonly STAMP=$VENV/distmoe-setup.stamp
readonly TORCH_SOURCE=$VENV/distmoe-torch-index # the index that torch came from; absent or empty: the ordinary one
readonly LOG=$VENV/setup.log
readonly CONSTRAINTS=${DISTMOE_CONSTRAINTS:-launch/constraints.txt}
readonly TORCH_INDEX_URL=${DISTMOE_TORCH_INDEX_URL:-}
readonly WITHOUT_FFCV=${DISTMOE_WITHOUT_FFCV:-0}
extras=${DISTMOE_EXTRAS-ffcv,deepspeed,dev}
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export DS_BUILD_OPS=0 # DeepSpeed compiles the operators a run uses when it first uses them

say() { printf 'setup: %s\n' "$*"; }

fail() { # MESSAGE [REMEDY ...]: one line each
    printf 'setup: error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

step() { # TITLE COMMAND ...: runs it and says how long it took
    local title=$1 started=$SECONDS
    shift
    say "$title ..."
    "$@"
    say "$title: done in $((SECONDS - started)) s"
}

wants() { [[ ",$extras," == *",$1,"* ]]; }

without_ffcv() { extras=$(tr ',' '\n' <<<"$extras" | sed '/^ffcv$/d' | paste -sd, -); }

# ---------------------------------------------------------------------------------------------- the interpreter

# Run, not looked up: version managers put commands on the PATH that only print an error.
suitable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1
}

find_python() { # sets python, or leaves it empty
    python=""
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
        return
    fi
    if [ -x "$VENV_PYTHON" ] && suitable "$VENV_PYTHON"; then # what is there already decides
        python=$("$VENV_PYTHON" -c 'import sys; print(sys._base_executable)')
        return
    fi
    local candidate
    for candidate in python3.12 python3.11 python3 /usr/bin/python3.12 /usr/bin/python3.11; do
        if suitable "$candidate"; then
            python=$candidate
            return
        fi
    done
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

from_distribution() { [ "$("$1" -c 'import sys; print(sys.base_prefix)')" = /usr ]; }

has_headers() {
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))'
}

# ---------------------------------------------------------------------------------------------- system packages

# pkg-config is asked, not the package manager: what counts is that FFCV's build finds the libraries, whoever put them there.
missing_packages() { # sets missing, by the names of Debian 12 and Ubuntu 24.04
    missing=()
    if [ -z "$python" ]; then
        missing+=(python3 python3-venv)
        ! wants ffcv || missing+=(python3-dev)
    elif ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 && [ ! -x "$VENV_PYTHON" ]; then
        missing+=("python$(version_of "$python")-venv")
    fi
    wants ffcv || return 0
    if ! { command -v g++ && command -v gcc && command -v make; } >/dev/null; then
        missing+=(build-essential)
    fi
    command -v pkg-config >/dev/null || missing+=(pkg-config)
    pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
    pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
    if [ -n "$python" ] && ! has_headers "$python"; then
        missing+=("python$(version_of "$python")-dev")
    fi
}

as_root() { # COMMAND ...: as root, through sudo where need be
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif sudo -n true 2>/dev/null || [ -t 0 ]; then # a password can be typed only at a terminal
        sudo "$@"
    else
        return 1
    fi
}

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=300 "$@" </dev/null; }

install_packages() { # PACKAGE ...
    local packages=("$@") index log
    log=$(mktemp)
    # A fresh machine has no package lists. A stale list is no reason to stop: the installation decides.
    apt_get update >"$log" 2>&1 || say "apt-get update failed; trying with the lists at hand"
    for index in "${!packages[@]}"; do # the same library under its other name
        if [ "${packages[index]}" = libturbojpeg0-dev ] && ! apt-cache show libturbojpeg0-dev >/dev/null 2>&1; then
            packages[index]=libturbojpeg-dev
        fi
    done
    if ! apt_get install --no-install-recommends "${packages[@]}" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        rm -f "$log"
        tell_and_stop "${packages[@]}"
    fi
    rm -f "$log"
}

tell_and_stop() { # PACKAGE ...: what a person has to do, for want of apt or the rights to use it
    local remedy=("Install them and run this again. On Debian 12 or Ubuntu 24.04, as root:"
        "    apt-get update && apt-get install -y $*"
        "Elsewhere: a C++ compiler, pkg-config, OpenCV 4 with headers (opencv4.pc), libturbojpeg with headers"
        "(libturbojpeg.pc), and Python 3.11 or 3.12 with its headers and the venv module.")
    if wants ffcv; then
        remedy+=("To go on without FFCV (slower data feed, train with data.loader=resident):"
            "    DISTMOE_WITHOUT_FFCV=1 bash launch/setup.sh")
    fi
    fail "system packages are missing: $*" "${remedy[@]}"
}

ensure_system_packages() {
    missing_packages
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ -n "$python" ] && ! from_distribution "$python" && [[ " ${missing[*]} " == *" python3."* ]]; then
        fail "$("$python" -c 'import sys; print(sys.executable)') lacks its headers (Python.h) or the venv module." \
            "It does not come from the distribution: reinstall it with them, or choose another: PYTHON=/usr/bin/python3"
    fi
    command -v apt-get >/dev/null || tell_and_stop "${missing[@]}"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || tell_and_stop "${missing[@]}"
    as_root true || tell_and_stop "${missing[@]}"
    step "system packages: ${missing[*]}" install_packages "${missing[@]}"
    [ -n "$python" ] || find_python
    [ -n "$python" ] || fail "no Python 3.11 or 3.12 found (python3 here is $(python3 -V 2>&1 || echo absent))." \
        "Install one, or name it: PYTHON=/path/to/python3.11 bash launch/setup.sh"
    missing_packages
    [ ${#missing[@]} -eq 0 ] || tell_and_stop "${missing[@]}"
}

# ---------------------------------------------------------------------------------------- the virtual environment

ensure_venv() {
    # A link leads into another checkout's environment, which would end up holding this checkout instead of its own.
    [ ! -L "$VENV" ] || fail "$VENV is a link to $(readlink "$VENV") and is not up to date." \
        "Run launch/setup.sh in the checkout it belongs to, or remove the link."
    if [ -x "$VENV_PYTHON" ] && suitable "$VENV_PYTHON" && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        if [ -n "${PYTHON:-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of "$VENV_PYTHON")" ]; then
            fail "$VENV has Python $(version_of "$VENV_PYTHON"), but PYTHON=$PYTHON is $(version_of "$PYTHON")." \
                "Remove $VENV to change it: rm -rf $VENV"
        fi
        has_moved || return 0
        say "$VENV was made for another folder; making it anew"
    fi
    step "virtual environment with $("$python" -V)" "$python" -m venv --clear "$VENV"
}

# The commands in bin/ and the editable install carry absolute paths: a moved checkout needs a new environment.
has_moved() {
    local home
    home=$(sed -n 's/^command = .* -m venv \(--clear \)\{0,1\}//p' "$VENV/pyvenv.cfg")
    [ -n "$home" ] && [ "$home" != "$(realpath "$VENV")" ]
}

pip_install() { # ARGUMENT ...
    "$VENV_PYTHON" -m pip install --constraint "$VENV/constraints.txt" "$@" >>"$LOG" 2>&1 && return
    tail -n 25 "$LOG" >&2
    fail "pip install failed; the whole log is in $LOG." "$(pip_remedy)" "Then run this again: what is installed stays."
}

pip_remedy() {
    local end
    end=$(tail -n 60 "$LOG")
    if grep -q "No space left on device" <<<"$end"; then
        echo "Free space on the disk. The CPU-only build of torch takes far less: set DISTMOE_TORCH_INDEX_URL to its index."
    elif grep -qE "ConnectionError|NameResolutionError|ConnectTimeout|Network is unreachable" <<<"$end"; then
        echo "The package index was not reached: check the network, or pip's settings for a proxy or a mirror."
    elif grep -qE "No matching distribution|Could not find a version|ResolutionImpossible" <<<"$end"; then
        echo "The index lacks a version of $CONSTRAINTS: name another list of versions with DISTMOE_CONSTRAINTS=FILE."
    elif grep -qiE "(failed|error).*ffcv|_libffcv" <<<"$end"; then
        echo "FFCV did not build. Mend what the log names, or go on without it: DISTMOE_WITHOUT_FFCV=1 bash launch/setup.sh"
    else
        echo "Mend what the log names, or start afresh: rm -rf $VENV"
    fi
}

write_constraints() {
    if [ -z "$TORCH_INDEX_URL" ]; then
        cp "$CONSTRAINTS" "$VENV/constraints.txt"
    else # torch names the exact CUDA packages it needs, and another build of it needs others
        grep -vE '^(nvidia-|cuda-|triton)' "$CONSTRAINTS" >"$VENV/constraints.txt"
    fi
}

install_torch() {
    local arguments=(torch torchvision) installed_from=""
    [ ! -f "$TORCH_SOURCE" ] || installed_from=$(<"$TORCH_SOURCE")
    # Only torch from another index: what it depends on comes with the rest, from the ordinary one.
    [ -z "$TORCH_INDEX_URL" ] || arguments+=(--no-deps --index-url "$TORCH_INDEX_URL")
    # To pip, 2.14.1+cpu and 2.14.1 both satisfy 2.14.1: it would leave the build of the former index in place.
    [ "$installed_from" = "$TORCH_INDEX_URL" ] || arguments+=(--no-deps --force-reinstall)
    pip_install "${arguments[@]}"
    printf '%s' "$TORCH_INDEX_URL" >"$TORCH_SOURCE"
}

install_distmoe() {
    local arguments=(--editable ".${extras:+[$extras]}")
    [ -z "$TORCH_INDEX_URL" ] || arguments+=(--extra-index-url "$TORCH_INDEX_URL")
    # FFCV's and DeepSpeed's set-up scripts import numpy and torch: they need this environment, not an empty one.
    pip_install --no-build-isolation "${arguments[@]}"
}

# What a change on the machine breaks most often, without importing torch: the interpreter, the packages' presence,
# and the system libraries that FFCV's extension is linked to.
works() {
    "$VENV_PYTHON" - "$extras" >/dev/null 2>&1 <<'PY'
import ctypes, importlib.metadata, pathlib, sys, sysconfig
names = ["distmoe", "torch", "torchvision", "numpy", "numba", "accelerate", "tensorboard", "pydantic", "typer"]
wanted = {"ffcv": ["ffcv"], "deepspeed": ["deepspeed"], "peers": ["transformers"],
          "dev": ["pytest", "hypothesis", "ruff", "mypy"]}
for extra in sys.argv[1].split(","):
    names += wanted.get(extra, [])
for name in names:
    importlib.metadata.version(name)
if "ffcv" in names:
    ctypes.CDLL(str(next(pathlib.Path(sysconfig.get_paths()["platlib"], "ffcv").glob("_libffcv*.so"))))
PY
}

imports() { # the proof, once, at the end of an installation
    local modules=(torch torchvision numba accelerate)
    ! wants ffcv || modules+=(ffcv)
    ! wants deepspeed || modules+=(deepspeed)
    local module
    for module in "${modules[@]}"; do
        "$VENV_PYTHON" -W ignore -c "import $module" >>"$LOG" 2>&1 && continue
        tail -n 5 "$LOG" >&2
        if [ "$module" = ffcv ]; then
            fail "ffcv is installed but does not import." \
                "A missing .so above: the system's OpenCV changed. Build FFCV again: rm -rf $VENV && bash launch/setup.sh" \
                "Or go on without it: DISTMOE_WITHOUT_FFCV=1 bash launch/setup.sh"
        fi
        fail "$module is installed but does not import (see above)." "Start afresh: rm -rf $VENV && bash launch/setup.sh"
    done
}

# ------------------------------------------------------------------------------------------------------- the run

# The stamp: the settings that what is installed came from, then the extras installed.
settings() {
    { cat pyproject.toml "$CONSTRAINTS" launch/setup.sh && printf '%s' "$TORCH_INDEX_URL"; } | sha256sum | cut -d' ' -f1
}

up_to_date() {
    [ -f "$STAMP" ] && [ "$(sed -n 1p "$STAMP")" = "$(settings)" ] && ! has_moved && works || return 1
    local installed extra
    installed=$(sed -n 2p "$STAMP")
    for extra in ${extras//,/ }; do
        [[ ",$installed," == *",$extra,"* ]] || return 1
    done
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$VENV_PYTHON")" ]
}

already_set_up() {
    up_to_date || return 1
    say "up to date ($("$VENV_PYTHON" -V), extras: ${extras:-none})"
}

main() { # [system-packages]
    case $*:$# in
        :0 | system-packages:1) ;;
        *) fail "unknown arguments: $*" "Allowed: none, or system-packages. Settings are environment variables." ;;
    esac
    [ -z "${PYTHON:-}" ] || suitable "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is not Python 3.11 or 3.12."
    [ "$WITHOUT_FFCV" = 0 ] || without_ffcv
    if [ $# -gt 0 ]; then
        find_python
        ensure_system_packages
        say "system packages: complete"
        return
    fi
    [ -f "$CONSTRAINTS" ] || fail "DISTMOE_CONSTRAINTS=$CONSTRAINTS is not a file."
    # Looking takes no lock, and so no right to write: an image, or a checkout of somebody else, is used as it is.
    ! already_set_up || return 0
    { [ -w . ] && { [ ! -e "$VENV" ] || [ -w "$VENV" ]; }; } ||
        fail "$PWD/$VENV lacks some of the extras [$extras] or is out of date, and user $(id -u) may not change it." \
            "Run this as its owner; in an image, build it with them: --build-arg DISTMOE_EXTRAS=$extras"
    # Two set-ups of one checkout would install into the same folder: the second waits, then finds the work done.
    exec 9>.setup.lock
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another set-up of this checkout is running; waiting for it"
        flock 9
    fi
    ! already_set_up || return 0
    find_python
    ensure_system_packages
    ensure_venv
    rm -f "$STAMP" # from here to the end the environment is in between
    : >"$LOG"
    write_constraints
    say "Python packages go into $VENV; pip writes to $LOG"
    step "pip and build tools" pip_install pip setuptools wheel numpy
    step "torch and torchvision (up to 3 GB to fetch, several minutes)" install_torch
    step "distmoe with extras [$extras]" install_distmoe
    step "import check" imports
    { settings && printf '%s\n' "$extras"; } >"$STAMP.partial"
    mv "$STAMP.partial" "$STAMP"
    say "ready in $SECONDS s. Activate it with: source $VENV/bin/activate"
}

main "$@"
