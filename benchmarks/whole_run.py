"""Time complete runs, from the command to the written model, and compare with mergekit-tokensurgeon.

``python -m benchmarks.whole_run`` gives Gemma-3-270M the tokenizer of SmolLM2-135M with ``mergekit-yaml`` and a recipe
of this project, and with ``mergekit-tokensurgeon``, each in its own process, and prints seconds, peak memory and
ratios. The cache of sparse codes is disabled.

With ``--base untied`` the base has two matrices to transplant, while the donor, SmolLM2, ties them: a small Llama with
random weights and the tokenizer of Qwen 2.5. (Solves use the donor's rows, so the base's rows do not affect the time.)
It needs the ``test`` extra for that tokenizer, and a quarter of an hour.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.solver import in_a_process

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "tests")]

import real_weights  # noqa: E402

UNTIED = "untied"


def main() -> None:
    """Run each command, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="gemma3", choices=[*real_weights.SOURCES, UNTIED])
    parser.add_argument("-k", type=int, default=64)
    options = parser.parse_args()
    donor = real_weights.checkpoint("gemma3" if options.base == "smollm2" else "smollm2")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # Linux includes the peak of this process in that of its child processes, so it must stay small.
        base = in_a_process(untied, work / "base") if options.base == UNTIED else real_weights.checkpoint(options.base)
        recipe = {"merge_method": "omp", "models": [{"model": str(base)}], "tokenizer": {"source": str(donor)}}
        commands = {
            "mergekit-tokensurgeon": ["mergekit-tokensurgeon", str(base), str(donor), "OUT", "-k", str(options.k)],
            "omp, the default": written(recipe, {"k": options.k}, work / "default.yml"),
            "omp, reconstruction: combination": written(
                recipe, {"k": options.k, "reconstruction": "combination"}, work / "combination.yml"
            ),
        }
        reference = None
        print("| command | seconds | ratio | peak MiB |\n|---|---|---|---|")
        for name, command in commands.items():
            seconds, peak = timed([str(work / "out") if part == "OUT" else part for part in command])
            shutil.rmtree(work / "out")
            reference = reference or seconds
            print(f"| {name} | {seconds:.1f} | {reference / seconds:.1f} | {peak / 2**20:,.0f} |", flush=True)


def untied(folder: Path) -> Path:
    """Write a checkpoint of two layers with the width and vocabulary of Qwen2.5-0.5B and untied embeddings."""
    import torch
    from helpers import tokenizers_for_tests
    from helpers.checkpoints import make_model, save

    tokenizer = tokenizers_for_tests.qwen()
    return save(folder, make_model(tokenizer, hidden=896, intermediate=1024, dtype=torch.bfloat16), tokenizer)


def written(recipe: dict, parameters: dict, path: Path) -> list[str]:
    """Write a recipe to a file and return its command."""
    path.write_text(yaml.safe_dump({**recipe, "parameters": parameters}))
    return ["mergekit-yaml", str(path), "OUT"]


def timed(command: Sequence[str]) -> tuple[float, int]:
    """Run a command; return its wall-clock time in seconds and its peak resident memory in bytes."""
    program = shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0]
    started = time.perf_counter()
    child = os.posix_spawn(program, [program, *command[1:]], {**os.environ, "MERGEKIT_OMP_CACHE": "off"})
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} exited with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
