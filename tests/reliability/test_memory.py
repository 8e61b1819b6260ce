"""Test that a run needs no more memory than ``mergekit-omp inspect`` said, on vocabularies of some size.

The peak is what the operating system reports of the process (``VmHWM``), files that it has mapped included. A
limit on address space, as ``ulimit -v`` sets, says little about torch, which reserves much that it never touches.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.checkpoints import make_model, merge, save, wide_tokenizer
from helpers.commands import recipe

from mergekit_omp.cli.main import main

TOLERANCE = 1.1


def promised(given: dict[str, Any], folder: Path, *options: str) -> int:
    """Return the peak memory that ``inspect`` prints for a recipe, in bytes."""
    path = folder / "inspected.yml"
    path.write_text(yaml.safe_dump(given))
    result = CliRunner().invoke(main, ["inspect", str(path), "--no-time", "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["estimate"]["peak_memory_bytes"]


def used(given: dict[str, Any], out: Path) -> int:
    """Run a recipe in a process of its own, and return its peak memory in bytes."""
    merge(given, out, "--quiet")
    return json.loads((out / "omp_record.json").read_text())["peak_memory_bytes"]


def test_a_large_parent_is_not_counted() -> None:
    large = bytearray(2 * 2**30)
    large[:: 2**12] = b"1" * (len(large) // 2**12)
    code = "from mergekit_omp.report.record import peak_memory; print(peak_memory())"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0 < int(result.stdout) < len(large)


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "unsafe_tokens"), [(1, "keep"), (2, "keep"), (1, "pieces")])
def test_wide_vocabularies(tmp_path: Path, inputs: int, unsafe_tokens: str) -> None:
    """Transplant models with matrices of 250 MB, of which 2,000 rows are new; `pieces` loads a base completely."""
    tokenizers = {"base0": wide_tokenizer(0, 60_000), "base1": wide_tokenizer(0, 59_000)}
    for name, tokenizer in list(tokenizers.items())[:inputs]:
        save(tmp_path / name, make_model(tokenizer, hidden=1024, intermediate=64, layers=1), tokenizer)
    donor = wide_tokenizer(2000, 62_000)
    save(tmp_path / "donor", make_model(donor, hidden=64, layers=1), donor)
    given = recipe(tmp_path / "base0", tmp_path / "donor", parameters={"k": 5, "unsafe_tokens": unsafe_tokens})
    if inputs > 1:
        given["merge_method"] = "omp_linear"
        given["models"] = [{"model": str(tmp_path / f"base{number}")} for number in range(inputs)]
        given["parameters"]["weight"] = 0.5
    expected = promised(given, tmp_path)
    assert used(given, tmp_path / "out") <= TOLERANCE * expected


def test_a_complete_model_is_counted(tmp_path: Path) -> None:
    """`inspect` promises its weights in addition, where they are more than the solve needs."""
    tokenizer = wide_tokenizer(0, 2000)
    save(tmp_path / "base", make_model(tokenizer, hidden=64, intermediate=40_000, layers=4), tokenizer)
    save(tmp_path / "donor", make_model(wide_tokenizer(100, 2100), hidden=64), wide_tokenizer(100, 2100))
    plain = recipe(tmp_path / "base", tmp_path / "donor")
    keep = promised(plain, tmp_path)
    weights = (tmp_path / "base" / "model.safetensors").stat().st_size
    for more in ({"unsafe_tokens": "mean"}, {"numerals": "digits"}):
        extra = promised(plain | {"parameters": plain["parameters"] | more}, tmp_path) - keep
        assert 0.8 * weights < extra < 1.6 * weights


@pytest.mark.slow
def test_real_pair(gemma3_dir: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    """Transplant Gemma-3-270M, whose solve keeps a matrix of all pairs of anchors."""
    given = recipe(gemma3_dir, smollm2_dir, parameters={"k": 64}, dtype="bfloat16")
    expected = promised(given, tmp_path)
    assert used(given, tmp_path / "out") <= TOLERANCE * expected
