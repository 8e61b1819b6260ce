"""Run every recipe of a folder on a Ray cluster, with one accelerator per recipe.

    pip install ray
    python examples/ray_transplants.py recipes/ out/ --gpus 1

Each recipe is one ``mergekit-yaml`` run; the folders must be on a shared file system.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import ray


def transplant(recipe: str, out: str, on_gpu: bool) -> tuple[str, int, str]:
    """Run one recipe; return its name, the exit status and the last line of the log."""
    command = ["mergekit-yaml", recipe, out, *(["--cuda"] if on_gpu else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return recipe, result.returncode, (result.stderr.strip().splitlines() or [""])[-1]


def main() -> None:
    """Submit all recipes, and print the result of each when it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=float, default=0, help="accelerators for each run")
    options = parser.parse_args()
    ray.init()
    remote = ray.remote(num_gpus=options.gpus, num_cpus=1)(transplant)
    pending = [
        remote.remote(str(recipe.resolve()), str((options.out / recipe.stem).resolve()), options.gpus > 0)
        for recipe in sorted(options.recipes.glob("*.yml"))
    ]
    failed = 0
    while pending:
        [done], pending = ray.wait(pending)
        recipe, status, last = ray.get(done)
        failed += status != 0
        print(f"{'ok    ' if status == 0 else 'FAILED'} {recipe}  {last}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
