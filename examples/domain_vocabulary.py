"""Train a tokenizer on texts of a domain and transplant it, for fewer tokens per text.

    python examples/domain_vocabulary.py --model my-model/ --text notes/*.txt

No model has the new tokenizer, so there are no donor rows for OMP: each new token gets the mean of the rows of its
former pieces (``approximation: subword``). The model is worse on its domain than before until it has been trained
briefly; the printed scores are the starting point of that training. The default is SmolLM2-135M and the source code of
Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import one_vocabulary
import real_weights
from transformers import AutoTokenizer

from mergekit_omp.evaluation.bits_per_byte import builtin_texts, windows
from mergekit_omp.report.scores import evaluate, format_scores

_BATCH_BYTES = 2**16


def split(text: str, share: float = 0.1) -> tuple[str, str]:
    """Split a text at a line end into a training part and a held-out part, the last ``share`` of it."""
    cut = text.rfind("\n", 0, int(len(text) * (1 - share))) + 1
    if not 0 < cut < len(text):
        sys.exit("error: the text has too few lines for a held-out part; give a longer text.")
    return text[:cut], text[cut:]


def train_tokenizer(model: str, text: str, size: int | None, folder: Path) -> None:
    """Train a tokenizer of the model's kind, with its special tokens, and save it without a model."""
    original = AutoTokenizer.from_pretrained(model)
    new = original.train_new_from_iterator(windows(text, _BATCH_BYTES), size or len(original), show_progress=False)
    new.save_pretrained(folder)
    saved = AutoTokenizer.from_pretrained(folder)
    sample = builtin_texts()["languages"]
    if saved.decode(saved(sample, add_special_tokens=False).input_ids) != sample:
        sys.exit(f"error: a tokenizer like that of {model} cannot encode every text; use a model with byte-level BPE.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, transplant, and compare the two models on held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M)")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files (default: Python's standard library)")
    parser.add_argument("--size", type=int, help="tokens of the new vocabulary (default: as many as the model's)")
    parser.add_argument("--bytes", type=int, default=12288, help="how much held-out text to read: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/domain"), help="the new model: %(default)s")
    options = parser.parse_args(arguments)
    one_vocabulary.be_quiet()
    model = options.model or str(real_weights.checkpoint("smollm2").resolve())
    files = options.text or sorted(Path(json.__file__).parents[1].glob("*.py"))
    training_text, held_out = split("\n".join(path.read_text(encoding="utf-8") for path in files))

    folder = options.out.with_name(options.out.name + "-tokenizer")
    train_tokenizer(model, training_text, options.size, folder)
    out = one_vocabulary.transplant(model, folder.resolve(), options.out, {"approximation": "subword"})
    texts = {"held out": windows(held_out, options.bytes)[0]}
    print("\n" + format_scores(evaluate([model, str(out)], texts, progress=False)))


if __name__ == "__main__":
    main()
