"""Test that everything without ``omp`` behaves as if this package were not installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, save

import mergekit_omp

PLANS = Path(__file__).parents[1] / "helpers/plans.py"
PACKAGE = Path(mergekit_omp.__file__).parent
WITHOUT = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def run(code: list[str], *, path: Path | None = None, **variables: str) -> str:
    """Return the output of a new Python in which ``path`` precedes all installed packages."""
    environment = os.environ | variables | ({"PYTHONPATH": str(path)} if path else {})
    result = subprocess.run([sys.executable, *code], capture_output=True, text=True, env=environment, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write three models of one architecture; the last has another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers = [byte_level_tokenizer(ENGLISH, 300)] * 2 + [byte_level_tokenizer(PYTHON, 310)]
    return [
        str(save(folder / str(seed), make_model(tokenizer, layers=1, seed=seed), tokenizer))
        for seed, tokenizer in enumerate(tokenizers)
    ]


def test_other_recipes_plan_to_the_same_tasks(models: list[str]) -> None:
    """Compare the tasks and errors of recipes of all methods of mergekit."""
    plans = [
        json.loads(run([str(PLANS), *models], **variables).split("PLANS ", 1)[1].splitlines()[0])
        for variables in (WITHOUT, {})
    ]
    without, with_ours = plans
    assert with_ours.pop("connected")
    assert not without.pop("connected")
    assert len(without) > 60
    assert sum(plan.startswith("tasks") for plan in without.values()) > 30
    assert with_ours == without


@pytest.mark.parametrize("missing", ["patches.py", "merge_methods.py", "parameters.py", "compat.py"])
def test_half_removed(tmp_path: Path, missing: str) -> None:
    """Check that torch and mergekit work after an incomplete uninstall, with at most a warning.

    The module of the entry point must exist: without it torch itself fails to import.
    """
    shutil.copytree(PACKAGE, tmp_path / "mergekit_omp", ignore=shutil.ignore_patterns(missing, "__pycache__"))
    output = run(
        [
            "-c",
            "import torch; torch.zeros(1); import mergekit.merge, mergekit.plan; "
            "from mergekit import merge_methods; print(merge_methods.get('linear').spec.name)",
        ],
        path=tmp_path,
    )
    assert "linear" in output
    assert "Traceback" not in output


OTHER_VERSION = {
    "config.py": "class MergeConfiguration: merge_method = 'linear'",
    "merge_methods.py": "def get(name): return name",
    "plan.py": "class MergePlanner:\n    def plan(self): return 'planned'",
    "merge.py": "def run_merge(recipe='linear'): return 'planned'",
}


@pytest.mark.parametrize("empty", [[], ["plan.py", "config.py"]])
def test_another_mergekit(tmp_path: Path, empty: list[str]) -> None:
    """Check that another version of mergekit works as before, whatever names it lacks."""
    package = tmp_path / "mergekit"
    package.mkdir()
    for name, text in ({"__init__.py": ""} | OTHER_VERSION).items():
        (package / name).write_text("" if name in empty else text)
    output = run(
        [
            "-c",
            "import torch, mergekit.config, mergekit.plan, mergekit.merge_methods, mergekit.merge; "
            "print(mergekit.merge.run_merge()); print(getattr(mergekit.plan, 'MergePlanner', list)())",
        ],
        path=tmp_path,
    )
    assert "planned" in output
    assert "Traceback" not in output


def test_no_mergekit(tmp_path: Path) -> None:
    (tmp_path / "mergekit.py").write_text("raise ModuleNotFoundError('mergekit')")
    assert run(["-c", "import torch; print(torch.zeros(1))"], path=tmp_path) == "tensor([0.])\n"
