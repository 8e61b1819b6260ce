#!/usr/bin/env bash
# Runs the tests with the lowest and the newest allowed transformers, torch and pydantic, on the oldest and the newest
# Python at hand, and prints a Markdown table with a row a cell. Ends with status 1 where anything failed.
#
#   bash tests/matrix.sh                       the quick tests (-m "not slow")
#   bash tests/matrix.sh tests/unit -k solver  what pytest is to run instead
#
# MATRIX_CELLS         the cells, one a line: "PYTHON TRANSFORMERS TORCH PYDANTIC"; PYTHON is oldest, newest, a command or
#                      a path, the others are lowest, newest or a version
# MATRIX_CACHE         environments and logs; default ~/.cache/mergekit-omp-matrix
# MATRIX_VENV_OPTIONS  such as --system-site-packages, for a torch that is not pip's
#
# pip's own variables hold: without PIP_EXTRA_INDEX_URL naming an index of torch's CPU wheels, most versions of torch
# bring gigabytes of CUDA libraries per cell.
set -euo pipefail
cd "$(dirname "$0")/.."

cells=${MATRIX_CELLS:-"oldest lowest lowest lowest
oldest newest newest newest
newest lowest lowest lowest
newest newest newest newest"}
cache=${MATRIX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mergekit-omp-matrix}
if [ $# -eq 0 ]; then
    set -- -m "not slow" -n auto
fi

# Interpreters that start and that pyproject.toml allows, oldest first.
pythons() {
    local lowest candidate
    lowest=$(sed -nE 's/^requires-python = ">=3\.([0-9]+)"$/\1/p' pyproject.toml)
    for candidate in python3.{9..29} "$HOME"/.pyenv/versions/3.*/bin/python3; do
        "$candidate" -c "import sys, venv; sys.exit(sys.version_info < (3, $lowest))" 2>/dev/null || continue
        echo "$("$candidate" -c 'import sys; print(sys.version_info[1])') $candidate"
    done | sort -n -s -k1,1 -u | cut -d' ' -f2-
}

# What pip is asked for: PACKAGE VERSION.
requirement() {
    case $2 in
    lowest) sed -nE "s/^    \"$1>=([0-9.]+).*/$1==\1/p" pyproject.toml ;;
    newest) echo "$1" ;;
    *) echo "$1==$2" ;;
    esac
}

# One row of the table from the versions of an environment and pytest's report, if it wrote one.
row() {
    "$1" - "$2" <<'PYTHON'
import platform
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version

cells = [platform.python_version(), *map(version, ("transformers", "torch", "pydantic"))]
try:
    suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite").attrib
except OSError:
    cells += ["did not run", "", ""]
else:
    tests, skipped = int(suite["tests"]), int(suite["skipped"])
    failed = int(suite["failures"]) + int(suite["errors"])
    cells += [tests - failed - skipped, failed, skipped]
print("|", " | ".join(map(str, cells)), "|")
PYTHON
}

mapfile -t found < <(pythons)
if [ ${#found[@]} -eq 0 ]; then
    echo "No Python that pyproject.toml allows was found." >&2
    exit 1
fi
mkdir -p "$cache"
status=0
echo "| Python | transformers | torch | pydantic | passed | failed | skipped |"
echo "|---|---|---|---|---:|---:|---:|"
while read -r python transformers torch pydantic; do
    case $python in
    oldest) python=${found[0]} ;;
    newest) python=${found[-1]} ;;
    esac
    name="$("$python" -c 'import platform; print(platform.python_version())')-$transformers-$torch-$pydantic"
    environment=$cache/$name
    log=$cache/$name.log
    report=$cache/$name.xml
    rm -f "$report"
    echo "$name: $log" >&2
    if [ ! -x "$environment/bin/python" ]; then
        # Options are several words.
        # shellcheck disable=SC2086
        "$python" -m venv ${MATRIX_VENV_OPTIONS:-} "$environment"
        "$environment/bin/python" -m pip install -q --upgrade pip >"$log" 2>&1
    fi
    if ! "$environment/bin/python" -m pip install -q --upgrade "$(requirement transformers "$transformers")" \
        "$(requirement torch "$torch")" "$(requirement pydantic "$pydantic")" -e ".[test]" >"$log" 2>&1; then
        echo "| ${name//-/ | } | not installed | | |"
        status=1
        continue
    fi
    "$environment/bin/python" -m pytest -q --junitxml="$report" "$@" >>"$log" 2>&1 </dev/null || status=1
    row "$environment/bin/python" "$report"
done <<<"$cells"
exit "$status"
