#!/usr/bin/env bash
# Makes a virtual environment in .venv, installs this project with the versions that are known to work, runs the tests.
# Options go to pytest: `bash tests/run.sh -m "not slow"` leaves out what takes longer than 30 seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
exec .venv/bin/python -m pytest "$@"
