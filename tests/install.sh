#!/usr/bin/env bash
# Makes a virtual environment in .venv and installs this project into it, with an extra of pyproject.toml:
# `bash tests/install.sh test`. Does nothing if that was done since pyproject.toml and constraints.txt last changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=$1
stamp=.venv/installed-$extra
if [ -x .venv/bin/mergekit-omp ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then
    exit
fi
if [ ! -x .venv/bin/python ]; then
    echo "Making a virtual environment in .venv" >&2
    python3 -m venv .venv
fi
echo "Installing mergekit-omp[$extra] into .venv: a few minutes the first time" >&2
quiet=--quiet
if [ -t 1 ]; then quiet=; fi  # pip draws progress bars in a terminal
.venv/bin/python -m pip install $quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
touch "$stamp"
