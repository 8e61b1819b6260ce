"""Run every recipe of a folder on a Ray cluster; one that fails stops no other.

    pip install ray
    python examples/ray_transplants.py recipes/ out/ --gpus 1

Each recipe is one ``mergekit-yaml`` run, whose log is beside its output folder. Recipes, models and outputs must be on
a file system that all nodes share. Finished outputs are kept, so that the same command again runs what is missing.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import ray


def transplant(recipe: Path, out: Path, on_gpu: bool) -> str:
    """Run a recipe on a node; return why it failed, or nothing."""
    command = ["mergekit-yaml", str(recipe), str(out), *(["--cuda"] if on_gpu else [])]
    log = out.with_name(f"{out.name}.log")
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status <= 0:
        return f"ended by signal {-status}" if status else ""
    return (log.read_text().strip().splitlines() or [f"exit status {status}"])[-1]


def main() -> None:
    """Submit all recipes, and print the result of each when it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, help="folder of *.yml files")
    parser.add_argument("out", type=Path, help="folder for a model and a log for each recipe")
    parser.add_argument("--cpus", type=float, default=1, help="CPU cores for each run (default 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each run (default 0)")
    parser.add_argument("--memory", type=float, help="GB for each run, as `mergekit-omp inspect` prints")
    options = parser.parse_args()
    recipes = sorted(options.recipes.resolve().glob("*.yml"))
    if not recipes:
        parser.error(f"{options.recipes} has no *.yml files")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    ray.init()
    memory = options.memory and options.memory * 1e9
    remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, memory=memory)(transplant)
    missing = [recipe for recipe in recipes if not (out / recipe.stem).exists()]
    running = {remote.remote(recipe, out / recipe.stem, options.gpus > 0): recipe for recipe in missing}
    failed = 0
    while running:
        [run], _ = ray.wait(list(running))
        recipe = running.pop(run)
        try:
            reason = ray.get(run)
        except ray.exceptions.RayError as error:  # the node was lost, or has no mergekit-yaml
            reason = str(error).strip().splitlines()[-1]
        failed += bool(reason)
        print(f"FAILED  {recipe}: {reason}" if reason else f"ok      {recipe}", flush=True)
    print(f"{len(recipes) - failed} of {len(recipes)} models are in {out}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
