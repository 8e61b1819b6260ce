"""Realign and merge real weights in one recipe, and measure the loss of every step.

``python -m benchmarks.chained_merge`` makes a perturbed copy of Gemma-3-270M, merges it with the original by
``omp_linear`` onto SmolLM2's tokenizer, and prints bits per byte of every model on the beginning of the built-in
held-out texts.
"""

import logging
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import real_weights

import mergekit_omp
from mergekit_omp.evaluation.bits_per_byte import builtin_texts
from mergekit_omp.report.scores import evaluate, format_scores

NOISE = 0.1
"""Standard deviation of the perturbation relative to that of the matrix."""

CHARACTERS = 1500
"""Characters of each text: five models take some minutes on two CPU cores."""


def main() -> None:
    """Make the models, merge, and print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    mergekit_omp.register()
    gemma, smollm2 = (real_weights.checkpoint(name) for name in ("gemma3", "smollm2"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        perturb(gemma, work / "perturbed")
        transplanted = {"merge_method": "omp", "models": [{"model": str(gemma)}]}
        merged = {
            "merge_method": "omp_linear",
            "models": [{"model": str(gemma)}, {"model": str(work / "perturbed")}],
            "parameters": {"weight": 0.5},
        }
        perturbed_only = {"merge_method": "omp", "models": [{"model": str(work / "perturbed")}]}
        for name, recipe in (("omp_gemma", transplanted), ("omp_perturbed", perturbed_only), ("omp_linear", merged)):
            run({**recipe, "tokenizer": {"source": str(smollm2)}, "dtype": "bfloat16"}, work / name)
        names = ["perturbed", "omp_gemma", "omp_perturbed", "omp_linear"]
        texts = {name: text[:CHARACTERS] for name, text in builtin_texts().items()}
        print(format_scores(evaluate([gemma, *(work / name for name in names)], texts)))


def perturb(model: Path, out: Path) -> None:
    """Write a copy of a model with noise on every matrix, as a stand-in for a fine-tune."""
    generator = torch.Generator().manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for parameter in loaded.parameters():
        if parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator) * NOISE * parameter.data.float().std()
            parameter.data += noise.to(parameter.dtype)
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def run(recipe: dict, out: Path) -> None:
    """Run one recipe."""
    shutil.rmtree(out, ignore_errors=True)
    print(yaml.safe_dump(recipe, sort_keys=False))
    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions())


if __name__ == "__main__":
    main()
