"""Test the scripts in examples/ that run many recipes, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.checkpoints import make_model, save, wide_tokenizer
from helpers.commands import recipe
from helpers.environments import python_with

from mergekit_omp.cli.main import main as omp

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["fine-tune-1", "fine-tune-2", "missing-donor", "other-k"]
RAY = "ray==2.60.0"


@pytest.fixture
def recipes(tmp_path: Path) -> list[Path]:
    """Write four recipes: two with the same solve, one with another, and one whose donor does not exist."""
    tokenizers = {
        "base-1": wide_tokenizer(0, 5000),
        "base-2": wide_tokenizer(0, 5000),
        "donor": wide_tokenizer(1000, 8000),
    }
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        save(tmp_path / name, make_model(tokenizer, tied=True, hidden=64, layers=1, seed=seed), tokenizer)

    def written(name: str, base: str, donor: str, k: int) -> Path:
        path = tmp_path / "recipes" / f"{name}.yml"
        path.write_text(yaml.safe_dump(recipe(tmp_path / base, tmp_path / donor, parameters={"k": k})))
        return path

    (tmp_path / "recipes").mkdir()
    kinds = [("base-1", "donor", 64), ("base-2", "donor", 64), ("base-1", "nowhere", 64), ("base-1", "donor", 48)]
    return [written(name, *kind) for name, kind in zip(NAMES, kinds, strict=True)]


def start(command: list[Any], cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script, with the commands of the tests' environment first and with a cache of codes."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "MERGEKIT_OMP_CACHE": str(cache)} | variables
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)


def assert_whole(folder: Path) -> None:
    """Compare the files of a model with the checksums that the run recorded."""
    result = CliRunner().invoke(omp, ["audit", str(folder), "--verify"])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def python_with_ray() -> Path:
    """Return an interpreter with Ray and without torch; skip where Ray has no build for this Python or system."""
    try:
        return python_with("ray", RAY)
    except subprocess.CalledProcessError as error:
        if "No matching distribution found" not in error.stderr:
            raise
        pytest.skip(f"the package index has no build of {RAY} for this Python and system")


@pytest.mark.network
@pytest.mark.slow
def test_ray(recipes: list[Path], tmp_path: Path, python_with_ray: Path) -> None:
    """One of four fails and is named, the others are whole, and two that need the same solve share it."""
    out, cache = tmp_path / "out", tmp_path / "codes"
    (tmp_path / "recipes" / "made-before.yml").write_text("a recipe whose output is there is not read")
    (out / "made-before").mkdir(parents=True)
    script = [python_with_ray, EXAMPLES / "ray_transplants.py", tmp_path / "recipes", out]
    result = start(script, cache, RAY_USAGE_STATS_ENABLED="0")
    said = result.stdout + result.stderr
    assert result.returncode == 1, said
    assert "Traceback" not in said

    lines = [line for line in result.stdout.splitlines() if line.startswith(("ok", "FAILED"))]
    first, second, wrong, other = recipes
    assert sorted(line for line in lines if line.startswith("ok")) == [
        f"ok      {one}" for one in (first, second, other)
    ]
    [failed] = [line for line in lines if line.startswith("FAILED")]
    assert failed.startswith(f"FAILED  {wrong}: Error: ")
    assert str(tmp_path / "nowhere") in failed
    assert result.stdout.splitlines()[-1] == f"4 of 5 models are in {out}"

    made = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert made == ["fine-tune-1", "fine-tune-2", "made-before", "other-k"]
    for one in (first, second, other):
        assert_whole(out / one.stem)
    logs = {one.stem: (out / f"{one.stem}.log").read_text() for one in recipes}
    shared = "Read the sparse codes of model.embed_tokens.weight of"
    assert sorted(shared in logs[name] for name in ("fine-tune-1", "fine-tune-2")) == [False, True]
    assert shared not in logs["other-k"]
    assert len(list(cache.iterdir())) == 2, "one solve at each sparsity"


@pytest.mark.slow
def test_slurm(recipes: list[Path], tmp_path: Path) -> None:
    """Run tasks of an array by hand: each has its own log and status."""
    out, cache = tmp_path / "out", tmp_path / "codes"
    script = ["bash", EXAMPLES / "slurm_transplants.sh", out, *recipes]

    def task(number: int) -> tuple[int, str]:
        result = start(script, cache, SLURM_ARRAY_TASK_ID=str(number), SLURM_CPUS_PER_TASK="1")
        return result.returncode, result.stdout + result.stderr

    status, said = task(2)
    assert (status, len(said.splitlines())) == (1, 1)
    assert said.startswith(f"FAILED  {recipes[2]}: Error: ")
    assert str(tmp_path / "nowhere") in said
    assert task(1) == (0, f"ok      {recipes[1]}\n")
    assert_whole(out / "fine-tune-2")
    assert "1 solve" in (out / "fine-tune-2.log").read_text()
    assert "Traceback" not in (out / "missing-donor.log").read_text()
    assert task(1) == (0, f"kept    {recipes[1]}\n"), "the same task again changes nothing"
    assert task(4) == (2, "The array has a task 4, but the last of the 4 recipes is 3.\n")
    assert sorted(path.name for path in out.iterdir()) == ["fine-tune-2", "fine-tune-2.log", "missing-donor.log"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "unset: r.yml out/r"),
        ({"SLURM_GPUS_ON_NODE": "1"}, "unset: r.yml out/r --cuda"),
        ({"SLURM_CPUS_PER_TASK": "6"}, "6: r.yml out/r"),
    ],
)
def test_slurm_tells_the_run_what_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    command = tmp_path / "bin" / "mergekit-yaml"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "${OMP_NUM_THREADS:-unset}: $*"\n')
    command.chmod(0o755)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    script = ["bash", str(EXAMPLES / "slurm_transplants.sh"), "out", "r.yml"]
    subprocess.run(script, check=True, env=os.environ | {"PATH": path, "SLURM_ARRAY_TASK_ID": "0"} | given)
    assert Path("out/r.log").read_text() == f"{expected}\n"


def test_slurm_without_an_array() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    result = subprocess.run(
        ["bash", EXAMPLES / "slurm_transplants.sh", "out", "r.yml"], capture_output=True, text=True, env=environment
    )
    assert result.returncode != 0
    assert "SLURM_ARRAY_TASK_ID: is not set; start this with sbatch --array" in result.stderr
