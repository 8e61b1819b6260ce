"""Merge two models with different tokenizers, and train the realigned one in between: transplant, heal, merge.

    python examples/heal_then_merge.py --model a/ --partner b/

The model gets the partner's tokenizer, is trained against what it was before (``mergekit-omp heal``), and is then
merged with the partner by plain ``linear``. Both need bodies of the same shapes. The three commands are printed; the
outputs are in ``transplanted``, ``healed`` and ``merged`` in the folder ``--out``. Training texts are written by the
model itself, or named with ``--text``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import demo
import one_vocabulary
import yaml


def merge(model: str | Path, partner: str | Path, weight: float, out: Path) -> Path:
    """Merge two models that have the partner's tokenizer, with ``mergekit-yaml``, and return ``out``.

    Args:
        model: first model.
        partner: second model.
        weight: weight of the first model, in [0, 1].
        out: output folder.
    """
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(model), "parameters": {"weight": weight}},
            {"model": str(partner), "parameters": {"weight": 1 - weight}},
        ],
        "tokenizer": {"source": str(partner)},
        "dtype": "bfloat16",
    }
    path = out.with_name(out.name + ".yml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    demo.transplant(path, out)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="gets the partner's tokenizer")
    parser.add_argument("--partner", required=True, help="keeps its tokenizer")
    parser.add_argument("--out", type=Path, default=Path("out/heal-then-merge"), help="the outputs: %(default)s")
    parser.add_argument("-k", type=int, default=64, help="sparsity of the transplant: %(default)s")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10, help="how long to heal: %(default)s")
    length.add_argument("--tokens", type=int, help="how many tokens to heal with, instead")
    parser.add_argument("--text", type=Path, action="append", default=[], help="text to heal with; may be repeated")
    parser.add_argument("--device", default="cpu", help="where to heal: %(default)s")
    parser.add_argument("--weight", type=float, default=0.5, help="weight of the healed model: %(default)s")
    options = parser.parse_args(arguments)
    one_vocabulary.be_quiet()

    out = options.out
    transplanted = one_vocabulary.transplant(options.model, options.partner, out / "transplanted", {"k": options.k})
    how_long = ("--tokens", str(options.tokens)) if options.tokens else ("--minutes", f"{options.minutes:g}")
    texts = one_vocabulary.text_options(options.text)
    healed = one_vocabulary.heal(transplanted, out / "healed", *how_long, *texts, "--device", options.device)
    merged = merge(healed, options.partner, options.weight, out / "merged")
    print(f"\nThe merged model is in {merged}.")


if __name__ == "__main__":
    main()
