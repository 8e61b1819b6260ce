"""Test tasks under mergekit's executor for several GPUs, which makes one of them torch's default device."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checkpoints import byte_level_tokenizer, make_model, run, save, sentencepiece_tokenizer
from helpers.commands import recipe
from mergekit import multigpu_executor
from mergekit.graph import Task

from mergekit_omp.tasks.tasks import SolveCodes

FROM_NOTHING = [
    "omp", "common_interpolation", "subword", "mean", "zero", "randn", "john_hewitt", "landmark_pca", "stb", "mp_rope",
]  # fmt: skip

BY_LSTSQ = {"mp_rope", "stb"}
"""LAPACK's least squares, whose last digits differ from run to run of the same recipe, wherever its tensors are."""


def ours(kind: type = Task) -> set[type]:
    """Return every task of this package."""
    found = {kind} if kind.__module__.startswith("mergekit_omp.") else set()
    return found.union(*map(ours, kind.__subclasses__()))


def elsewhere(execute: Callable) -> Callable:
    """Execute a task with a default device whose tensors have no data: none of them may be combined with others."""

    @wraps(execute)
    def placed(*arguments: Any, **named: Any) -> Any:
        with torch.device("meta"):
            return execute(*arguments, **named)

    return placed


@pytest.mark.parametrize(
    "parameters",
    [
        *({"approximation": name} for name in FROM_NOTHING),
        {"magikarp": True},
        {"numerals": "digits"},
        {"new_vocab_noise": 0.1, "reconstruction": "combination"},
    ],
    ids=str,
)
def test_the_default_device_does_not_matter(
    parameters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, donors = byte_level_tokenizer(), sentencepiece_tokenizer()
    base = save(tmp_path / "base", make_model(mine), mine)
    donor = save(tmp_path / "donor", make_model(donors, hidden=48, seed=1), donors)
    parameters = {"k": 5, **parameters} if parameters.get("approximation", "omp") == "omp" else parameters
    job = recipe(base, donor, parameters=parameters)
    expected = run(job, tmp_path / "expected")
    tasks = ours()
    assert len(tasks) >= 8
    for task in tasks:
        if "execute" in vars(task):
            monkeypatch.setattr(task, "execute", elsewhere(task.execute))
    found = run(job, tmp_path / "found")
    assert found.keys() == expected.keys()
    tolerance = 1e-6 if parameters.get("approximation") in BY_LSTSQ else 0
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=0, atol=tolerance)


def test_the_executor_for_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run mergekit's own, with two «GPUs» that are the CPU, to check placement, order and threads."""
    for name, value in {
        "get_torch_accelerator_type": lambda: "cpu",
        "get_torch_accelerator_count": lambda: 2,
        "get_torch_accelerator_module": lambda _: SimpleNamespace(synchronize=lambda device: None),
    }.items():
        monkeypatch.setattr(multigpu_executor, name, value)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    threads: set[int] = set()
    monkeypatch.setattr(
        SolveCodes,
        "execute",
        lambda *given, execute=SolveCodes.execute, **named: (
            threads.add(threading.get_ident()) or execute(*given, **named)
        ),
    )
    mine, donors = byte_level_tokenizer(), sentencepiece_tokenizer()
    models = [save(tmp_path / str(seed), make_model(mine, seed=seed), mine) for seed in (0, 1)]
    donor = save(tmp_path / "donor", make_model(donors, hidden=48, seed=2), donors)
    job = {
        "merge_method": "omp_slerp",
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models],
        "tokenizer": {"source": str(donor)},
        "parameters": {"t": 0.3, "k": 5},
        "dtype": "float32",
    }
    expected = run(job, tmp_path / "expected")
    assert threads == {threading.get_ident()}
    found = run(job, tmp_path / "found", multi_gpu=True)
    assert threads - {threading.get_ident()}, "another thread has solved"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], rows) for name, rows in expected.items())
