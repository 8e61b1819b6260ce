"""Test that peak memory is that of the vocabulary matrices and one shard, not of the model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)

MEGABYTE = 2**20
MEASURED = """
import resource, sys
from mergekit.scripts.run_yaml import main
main(sys.argv[1:], standalone_mode=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_memory(recipe: dict, out: Path, *options: str) -> int:
    """Return the peak memory of ``mergekit-yaml`` in bytes."""
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", MEASURED, str(path), str(out), "--quiet", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.split()[-1])


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_peak_memory_is_not_that_of_the_model(tmp_path: Path, safe: bool) -> None:
    """Compare a model of 440 MB in shards of 20 MB, with a sharded donor, with a tiny model."""
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    big = make_model(base_tokenizer, hidden=512, intermediate=2048, layers=28)
    size = sum(parameter.numel() * 4 for parameter in big.parameters())
    assert size > 400 * MEGABYTE
    tiny = make_model(base_tokenizer)
    donor = make_model(donor_tokenizer, architecture="mistral", hidden=24)
    paths = {
        "big": save(tmp_path / "big", big, base_tokenizer, shard_size="20MB", safe=safe),
        "tiny": save(tmp_path / "tiny", tiny, base_tokenizer, safe=safe),
        "donor": save(tmp_path / "donor", donor, donor_tokenizer, shard_size="20KB", safe=safe),
    }
    assert len(list(paths["big"].glob("*-of-*"))) > 20
    peaks = {}
    for name in ("tiny", "big"):
        recipe = {
            "merge_method": "omp",
            "models": [{"model": str(paths[name])}],
            "tokenizer": {"source": str(paths["donor"])},
            "dtype": "float32",
        }
        peaks[name] = peak_memory(recipe, tmp_path / f"{name}_out", "--out-shard-size", "20M")
    assert peaks["big"] - peaks["tiny"] < 120 * MEGABYTE

    before, after = big.state_dict(), tensors_of(tmp_path / "big_out")
    untouched = set(after) - {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(untouched) > 200
    assert all(torch.equal(before[name], after[name]) for name in untouched)
