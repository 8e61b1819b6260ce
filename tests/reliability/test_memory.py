"""Test that a run needs no more memory than ``mergekit-omp inspect`` said, on vocabularies of some size.

The peak of a run without a limit is what the operating system reports of the process (``VmHWM``), files that it has
mapped included. The real pair runs again in a control group of what was promised and 10 % more, without swap, where
the kernel would kill it, and must write the same tensors; where no control group can be made, under a limit of data. A
limit on address space, as ``ulimit -v`` sets, says little about torch, which reserves much that it never touches.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.checkpoints import make_model, merge, run_recipe, save, tensors_of, wide_tokenizer
from helpers.commands import recipe
from helpers.memory_limits import Limit, can_make_groups, control_group, data_limit

from mergekit_omp.cli.main import main

TOLERANCE = 1.1


def promised(given: dict[str, Any], folder: Path, *options: str) -> int:
    """Return the peak memory that ``inspect`` prints for a recipe, in bytes."""
    path = folder / "inspected.yml"
    path.write_text(yaml.safe_dump(given))
    result = CliRunner().invoke(main, ["inspect", str(path), "--no-time", "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["estimate"]["peak_memory_bytes"]


def wide_recipe(folder: Path, inputs: int = 1, unsafe_tokens: str = "keep") -> dict[str, Any]:
    """Write models with matrices of 250 MB and a donor with 2,000 new tokens; return a recipe."""
    for number in range(inputs):
        tokenizer = wide_tokenizer(0, 60_000 - 1000 * number)
        save(folder / f"base{number}", make_model(tokenizer, hidden=1024, intermediate=64, layers=1), tokenizer)
    donor = wide_tokenizer(2000, 62_000)
    save(folder / "donor", make_model(donor, hidden=64, layers=1), donor)
    given = recipe(folder / "base0", folder / "donor", parameters={"k": 5, "unsafe_tokens": unsafe_tokens})
    if inputs > 1:
        given["merge_method"] = "omp_linear"
        given["models"] = [{"model": str(folder / f"base{number}")} for number in range(inputs)]
        given["parameters"]["weight"] = 0.5
    return given


def promise_kept(given: dict[str, Any], out: Path) -> int:
    """Run a recipe in a process of its own, compare its peak with what ``inspect`` promises, and return that."""
    expected = promised(given, out.parent)
    merge(given, out, "--quiet")
    peak = json.loads((out / "omp_record.json").read_text())["peak_memory_bytes"]
    print(f"\npromised {expected / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert peak <= TOLERANCE * expected
    return expected


def test_a_large_parent_is_not_counted() -> None:
    large = bytearray(2 * 2**30)
    large[:: 2**12] = b"1" * (len(large) // 2**12)
    code = "from mergekit_omp.report.record import peak_memory; print(peak_memory())"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0 < int(result.stdout) < len(large)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="control groups and RLIMIT_DATA of this kind are Linux's")
@pytest.mark.parametrize("limit", [control_group, data_limit])
def test_a_limit_is_in_force(tmp_path: Path, limit: Limit) -> None:
    """Run with a third of what is promised: the kernel kills the run, or refuses it memory."""
    if limit is control_group and not can_make_groups():
        pytest.skip("no right to make control groups")
    given = wide_recipe(tmp_path)
    with limit(promised(given, tmp_path) // 3) as within:
        result = run_recipe(given, tmp_path / "out", "--quiet", within=within)
    if limit is control_group:
        assert result.returncode == -signal.SIGKILL
    else:
        assert result.returncode == 1
        assert "allocate memory" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "unsafe_tokens"), [(1, "keep"), (2, "keep"), (1, "pieces")])
def test_wide_vocabularies(tmp_path: Path, inputs: int, unsafe_tokens: str) -> None:
    """Transplant models with matrices of 250 MB, of which 2,000 rows are new; `pieces` loads a base completely."""
    promise_kept(wide_recipe(tmp_path, inputs, unsafe_tokens), tmp_path / "out")


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
    free, limited = tmp_path / "free", tmp_path / "limited"
    expected = promise_kept(given, free)
    limit = control_group if can_make_groups() else data_limit
    with limit(int(TOLERANCE * expected)) as within:
        merge(given, limited, "--quiet", within=within)
    print(f"whole with {limit.__name__} + 10 %")
    before, after = tensors_of(free), tensors_of(limited)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
