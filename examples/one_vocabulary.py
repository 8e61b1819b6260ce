"""Share code between the examples: load two models with one vocabulary, after transplanting one of them."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import demo
import real_weights
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mergekit_omp.report.record import RECORD_FILE


def add_arguments(parser: argparse.ArgumentParser, keeps: str, changes: str) -> None:
    """Add ``--<keeps>`` and ``--<changes>``, folders or hub ids, and options for the transplanted model."""
    parser.add_argument(f"--{keeps}", dest="keeps", help="keeps its tokenizer (default: SmolLM2-135M)")
    parser.add_argument(f"--{changes}", dest="changes", help="gets that tokenizer (default: Gemma-3-270M)")
    parser.add_argument("--transplanted", type=Path, help=f"the {changes} if it has that tokenizer already")
    parser.add_argument("--out", type=Path, default=Path(f"out/{changes}"), help="the transplant: %(default)s")
    parser.add_argument("-k", type=int, default=64, help="sparsity of the transplant: %(default)s")


def add_healing(parser: argparse.ArgumentParser, changes: str) -> None:
    """Add options for a model that was trained after the transplant."""
    parser.add_argument("--healed", type=Path, help=f"the {changes} after transplant and `mergekit-omp heal`")
    parser.add_argument(
        "--heal-minutes", type=float, default=0, metavar="M", help="heal the transplant for M minutes: %(default)g"
    )
    parser.add_argument(
        "--heal-text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="text to train on; may be repeated (default: the model writes texts before the transplant)",
    )


def folders(options: argparse.Namespace) -> tuple[str, str]:
    """Return the model that keeps its tokenizer, and the other model, which is transplanted if necessary."""
    be_quiet()
    keeps = options.keeps or str(real_weights.checkpoint("smollm2").resolve())
    if options.transplanted:
        return keeps, str(options.transplanted)
    return keeps, str(transplant(changes(options), keeps, options.out, {"k": options.k}))


def changes(options: argparse.Namespace) -> str:
    """Return the model that gets the other's tokenizer, before the transplant.

    If the transplanted model is given without it, its record names it.
    """
    if options.changes:
        return options.changes
    if not options.transplanted:
        return str(real_weights.checkpoint("gemma3").resolve())
    path = options.transplanted / RECORD_FILE
    models = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else []
    inputs = [model["name"] for model in models if "input" in model["roles"]]
    if len(inputs) != 1:
        raise SystemExit(f"{path} does not name the model before the transplant; give that model too.")
    return inputs[0]


def healed(options: argparse.Namespace, transplanted: str) -> str | None:
    """Return the healed model, made if ``--heal-minutes`` is given; without the two options print how to get it."""
    if options.healed:
        return str(options.healed)
    if not options.heal_minutes:
        print(
            "\nNo healed model: add --heal-minutes 10 to train the transplant for ten minutes, or --healed healed/ "
            f"after\n  mergekit-omp heal {transplanted} healed/"
        )
        return None
    out = options.out.with_name(options.out.name + "-healed")
    length = ("--base", changes(options), "--minutes", f"{options.heal_minutes:g}")
    return str(heal(transplanted, out, *length, *text_options(options.heal_text)))


def text_options(files: Sequence[Path]) -> list[str]:
    """Return the options of ``mergekit-omp heal`` for training texts; without any, the base writes them."""
    return [part for path in files for part in ("--text", str(path))]


def heal(transplanted: str | Path, out: Path, *options: str) -> Path:
    """Run ``mergekit-omp heal`` on a transplanted model, and return ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).parent / "mergekit-omp"), "heal", str(transplanted), str(out), *options]
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)
    return out


def transplant(model: str, source: str | Path, out: Path, parameters: Mapping[str, Any]) -> Path:
    """Write a recipe beside ``out``, run it with ``mergekit-yaml``, and return ``out``."""
    recipe = {
        "merge_method": "omp",
        "models": [{"model": str(model)}],
        "tokenizer": {"source": str(source)},
        "parameters": dict(parameters),
        "dtype": "bfloat16",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(out.name + ".yml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    demo.transplant(path, out)
    return out


def load(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in float32 for evaluation, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def with_start(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Encode a text with bos (or else eos) as int64 (1, T); without it Gemma is much worse."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return torch.tensor([[start, *tokenizer(text, add_special_tokens=False).input_ids]])


def be_quiet() -> None:
    """Reduce the log to the output of the examples."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
