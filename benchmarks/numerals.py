"""Measure the gain of ``numerals: digits`` for tokenizers that split numbers differently.

``python -m benchmarks.numerals`` gives SmolLM2-135M and Gemma-3-270M, which tokenise numbers digit by digit, the
tokenizer of Llama 3, which has tokens of up to three digits, and prints bits per byte of the built-in texts as
Markdown. No weights of Llama 3 are available, so its tokenizer has no model, and the other new rows are made with
``approximation: subword``. Needs the ``test`` extra for that tokenizer.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

import mergekit_omp
from mergekit_omp.evaluation.bits_per_byte import WINDOW_BYTES, builtin_texts, windows
from mergekit_omp.report.scores import evaluate

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "tests")]

import real_weights  # noqa: E402
from helpers import tokenizers_for_tests  # noqa: E402

WINDOWS = 2


def main() -> None:
    """Print one table per suite of texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", default=("tuning", "held_out"), choices=("tuning", "held_out"))
    options = parser.parse_args()
    mergekit_omp.register()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "llama3"
        tokenizers_for_tests.llama3().save_pretrained(source)
        models: dict[str, Path] = {}
        for base in real_weights.SOURCES:
            checkpoint = real_weights.checkpoint(base)
            models[f"{base}, original"] = checkpoint
            for numerals in ("approximate", "digits"):
                models[f"{base}, `numerals: {numerals}`"] = out = Path(folder) / f"{base}-{numerals}"
                recipe = {
                    "merge_method": "omp",
                    "models": [{"model": str(checkpoint)}],
                    "tokenizer": {"source": str(source)},
                    "parameters": {"approximation": "subword", "numerals": numerals},
                }
                run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(quiet=True))
        for suite in options.suite:
            texts = {
                name: "".join(windows(text, WINDOW_BYTES)[:WINDOWS]) for name, text in builtin_texts(suite).items()
            }
            scores = evaluate(list(models.values()), texts, progress=False)
            print(f"\n{suite} texts\n\n| | {' | '.join(texts)} |\n|---|{'---|' * len(texts)}")
            for name, score in zip(models, scores, strict=True):
                print(f"| {name} | {' | '.join(f'{text.bits_per_byte:.3f}' for text in score.texts)} |", flush=True)


if __name__ == "__main__":
    main()
