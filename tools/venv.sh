#!/bin/sh
# usage: sh tools/venv.sh [runtime|test|dev|bench|bench-peers]
# Leaves .venv with this checkout and the named dependencies installed; quick when it already is.
# PYTHON=... chooses the interpreter; otherwise the newest one found is used.
set -eu
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
venv_python=.venv/bin/python
usable='import sys; sys.exit(sys.version_info < (3, 10))'
can_make_venvs='import venv, ensurepip'
identity='import sys; print(sys.base_prefix, sys.version)'
version='import sys; print("%d.%d" % sys.version_info[:2])'

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

level=${1:-runtime}
case $level in
runtime) requirement=. satisfied_by='runtime test dev bench bench-peers' ;;
test) requirement='.[test]' satisfied_by='test dev bench bench-peers' ;;
dev) requirement='.[dev]' satisfied_by='dev' ;;
bench) requirement='.[bench]' satisfied_by='bench bench-peers' ;;
bench-peers) requirement='.[bench-peers]' satisfied_by='bench-peers' ;;
*) fail "usage: sh tools/venv.sh [runtime|test|dev|bench|bench-peers]" ;;
esac

find_python() {
    without_venv=
    for candidate in ${PYTHON:+"$PYTHON"} \
        $([ -n "${PYTHON:-}" ] ||
            echo python3.14 python3.13 python3.12 python3.11 python3.10 python3 python); do
        "$candidate" -c "$usable" >/dev/null 2>&1 || continue
        if "$candidate" -c "$can_make_venvs" >/dev/null 2>&1; then
            python=$candidate
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    if [ -n "$without_venv" ]; then
        found=$("$without_venv" -c "$version")
        fail "Python $found ($without_venv) cannot make virtual environments: ensurepip is missing." \
            "On Debian and Ubuntu: sudo apt-get install python$found-venv" \
            "Then run the same command again, or name another Python: make ... PYTHON=/path/to/python3"
    fi
    if [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON does not run as Python 3.10 or newer. Name another one, or leave PYTHON out."
    fi
    fail "No Python 3.10 or newer was found on PATH. Get one, then run the same command again:" \
        "  Debian, Ubuntu:  sudo apt-get install python3 python3-venv" \
        "  Fedora:          sudo dnf install python3" \
        "  macOS:           brew install python" \
        "  elsewhere:       https://www.python.org/downloads/" \
        "If it is installed but not on PATH: make ... PYTHON=/path/to/python3"
}

is_healthy() {
    "$venv_python" -c "$usable" >/dev/null 2>&1 && "$venv_python" -m pip --version >/dev/null 2>&1
}

is_requested_python() {
    [ -z "${PYTHON:-}" ] ||
        [ "$("$PYTHON" -c "$identity" 2>&1)" = "$("$venv_python" -c "$identity")" ]
}

# The scripts in .venv and the editable install name the place where they were made.
was_moved() {
    for stamp in .venv/.installed-*; do
        [ ! -e "$stamp" ] || [ "$(sed 1d "$stamp")" = "$(pwd -P)" ] || return 0
    done
    return 1
}

current=$(cksum <pyproject.toml && pwd -P)
is_installed() {
    for each in $satisfied_by; do
        [ "$(cat ".venv/.installed-$each" 2>/dev/null)" != "$current" ] || return 0
    done
    return 1
}

if ! is_healthy || was_moved || ! is_requested_python; then
    find_python
    echo "Making .venv with Python $("$python" -c "$version") ($python)"
    "$python" -m venv --clear .venv
fi
if ! is_installed; then
    echo "Installing into .venv (the first time takes a minute)"
    # Python 3.10.0 carries a pip that cannot install this project in editable mode.
    "$venv_python" -m pip install --quiet 'pip>=21.3'
    "$venv_python" -m pip install --quiet --editable "$requirement"
    printf '%s\n' "$current" >".venv/.installed-$level"
fi
