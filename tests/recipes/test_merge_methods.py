"""Compare ``omp_<method>``, which realigns and merges in one pass, with transplants followed by a merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, run, save, sentencepiece_tokenizer
from mergekit import merge_methods
from mergekit.merge_methods import BasePolicy

import mergekit_omp
from mergekit_omp.plugin.merge_methods import RealignedMerge

mergekit_omp.register()

K = 5
PLAIN = [m.spec.name for m in merge_methods.registered_methods() if not isinstance(m, RealignedMerge)]
NEEDS = {
    "slerp": {"t": 0.4},
    "nearswap": {"t": 0.01},
    "sce": {"select_topk": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.6},
    "dare_ties": {"weight": 0.5, "density": 0.6},
    "dare_linear": {"weight": 0.5, "density": 0.6},
    "breadcrumbs": {"weight": 0.5, "density": 0.8, "gamma": 0.05},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.8, "gamma": 0.05},
    "della": {"weight": 0.5, "density": 0.6, "epsilon": 0.1, "lambda": 1.0},
    "della_linear": {"weight": 0.5, "density": 0.6, "epsilon": 0.1, "lambda": 1.0},
    "linear": {"weight": 0.5},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write three models of one architecture with three vocabularies, and a donor with another that is not merged."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers = {
        "a": byte_level_tokenizer(ENGLISH, size=400),
        "b": byte_level_tokenizer(PYTHON, size=360, eos="</s>"),
        "c": sentencepiece_tokenizer(ENGLISH, size=420),
    }
    paths = {
        name: save(folder / name, make_model(tokenizer, seed=seed), tokenizer)
        for seed, (name, tokenizer) in enumerate(tokenizers.items())
    }
    donor = sentencepiece_tokenizer(PYTHON, size=400)
    paths["donor"] = save(folder / "donor", make_model(donor, architecture="mistral", hidden=24, seed=9), donor)
    for name in ("a1", "a2"):  # fine-tunes of a
        tokenizer = tokenizers["a"]
        paths[name] = save(folder / name, make_model(tokenizer, seed=ord(name[1])), tokenizer)
    return paths


def inputs_for(method: str) -> list[str]:
    """Return as many inputs as a method requires, the base first if it needs one."""
    contract = merge_methods.get(method).spec.contract
    most = contract.max_inputs or (contract.max_non_base or 2) + 1
    return ["a", "b", "c"][: min(3, most)]


def recipe_for(method: str, inputs: list[Path], **more: Any) -> dict[str, Any]:
    plain = method.removeprefix("omp_")
    recipe = {"merge_method": method, "models": [{"model": str(path)} for path in inputs], "dtype": "float32", **more}
    needs_base = merge_methods.get(plain).spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)
    if needs_base and len(inputs) > 1:
        recipe["base_model"] = str(inputs[0])
    recipe["parameters"] = {**NEEDS.get(plain, {}), **more.get("parameters", {})}
    return recipe


@pytest.mark.parametrize("method", PLAIN)
def test_one_pass_equals_transplanting_then_merging(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Compare bit for bit with transplants by ``omp`` that are merged by the plain method."""
    inputs = inputs_for(method)
    transplanted = {}
    for name in inputs:
        run(
            {
                "merge_method": "omp",
                "models": [{"model": str(models[name])}],
                "tokenizer": {"source": str(models["donor"])},
                "parameters": {"k": K},
                "dtype": "float32",
            },
            tmp_path / name,
        )
        transplanted[name] = tmp_path / name
    expected = run(recipe_for(method, [transplanted[name] for name in inputs]), tmp_path / "expected")
    one_pass = recipe_for(
        f"omp_{method}",
        [models[name] for name in inputs],
        tokenizer={"source": str(models["donor"])},
        parameters={"k": K},
    )
    result = run(one_pass, tmp_path / "result")
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), name


@pytest.mark.parametrize("method", PLAIN)
def test_equal_vocabularies_give_the_plain_method(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    inputs = [models[name] for name in ("a", "a1", "a2")][: len(inputs_for(method))]
    expected = run(recipe_for(method, inputs), tmp_path / "expected")
    result = run(recipe_for(f"omp_{method}", inputs, tokenizer={"source": str(inputs[0])}), tmp_path / "result")
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), name
