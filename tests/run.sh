#!/usr/bin/env bash
# Makes a virtual environment in .venv, installs this project with the versions that are known to work, runs the tests.
#
#   bash tests/run.sh                  all tests
#   bash tests/run.sh unit             tests/unit without real weights: under two minutes, for the edit loop
#   bash tests/run.sh unit -k digits   options after `unit` go to pytest
#   bash tests/run.sh slow             200 faults in whole runs, 20,000 damaged files and limits of memory: about an hour
#   bash tests/run.sh -m "not slow"    so do all other options: this leaves out what takes longer than 30 seconds
#   bash tests/run.sh -n 0 --pdb       one test at a time, instead of two
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/install.sh test
if [ "${1:-}" = unit ]; then
    shift
    set -- tests/unit -m "not slow and not network" "$@"
fi
if [ "${1:-}" = slow ]; then
    shift
    export MERGEKIT_OMP_FAULTS=200 MERGEKIT_OMP_FUZZ_CASES=20000 MERGEKIT_OMP_FUZZ_SECONDS="${MERGEKIT_OMP_FUZZ_SECONDS:-1800}"
    set -- -n 0 -s tests/reliability tests/recipes/test_fuzz.py "$@"
fi
exec .venv/bin/python -m pytest -n 2 "$@"
