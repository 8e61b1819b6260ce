#!/usr/bin/env bash
# Makes a virtual environment in .venv, installs this project with the versions that are known to work, runs the tests.
#
#   bash tests/run.sh                  all tests
#   bash tests/run.sh unit             tests/unit without real weights: under two minutes, for the edit loop
#   bash tests/run.sh unit -k digits   options after `unit` go to pytest
#   bash tests/run.sh -m "not slow"    so do all other options: this leaves out what takes longer than 30 seconds
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/install.sh test
if [ "${1:-}" = unit ]; then
    shift
    set -- tests/unit -m "not slow and not network" -n 2 "$@"
fi
exec .venv/bin/python -m pytest "$@"
