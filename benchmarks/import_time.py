"""Time what this package adds to ``import torch``, where it is installed.

``python -m benchmarks.import_time`` imports torch in processes of their own, without extensions, then looks for
extensions as torch does, and loads and calls this package's. It prints medians in milliseconds: the last row is the
cost of the package. The search is torch's own, and takes as long without the package.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

_CODE = """
import json, time
def now(): return time.process_time(), time.perf_counter()
at = [now()]
import torch
at.append(now())
from importlib.metadata import entry_points
found = [entry for entry in entry_points(group="torch.backends") if entry.name == "mergekit_omp"]
at.append(now())
for entry in found: entry.load()()
at.append(now())
assert found, "mergekit-omp is not installed"
print(json.dumps([[1000 * (b - a) for a, b in zip(*pair)] for pair in zip(at, at[1:])]))
"""
_STEPS = ("import torch", "torch's search for extensions", "mergekit-omp")


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=7)
    options = parser.parse_args()
    measured = [_measure() for _ in range(options.processes)]
    print("| step | CPU ms | ms |\n|---|---:|---:|")
    for step, times in zip(_STEPS, zip(*measured, strict=True), strict=True):
        cpu, wall = (statistics.median(kind) for kind in zip(*times, strict=True))
        print(f"| {step} | {cpu:,.1f} | {wall:,.1f} |")


def _measure() -> list[list[float]]:
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    result = subprocess.run([sys.executable, "-c", _CODE], check=True, capture_output=True, text=True, env=environment)
    return json.loads(result.stdout)


if __name__ == "__main__":
    main()
