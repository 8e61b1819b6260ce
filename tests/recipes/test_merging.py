"""Test recipes that realign several inputs: tokenizer sources, parameters, overrides, structure, shared solves."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    run,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from mergekit import merge_methods, plan
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache, ReturnTensor
from mergekit.merge import _get_donor_model, _model_out_config
from mergekit.merge_methods import TensorGroup, merge_method
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from mergekit_omp.tasks import tasks

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
K = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a, b, c of one architecture and three vocabularies; fine-tunes a1, a2 of a; two donors with another."""
    folder = tmp_path_factory.mktemp("models")
    a = byte_level_tokenizer(ENGLISH, size=400)
    tokenizers = {
        "a": a,
        "a1": a,
        "a2": a,
        "b": byte_level_tokenizer(PYTHON, size=360, eos="</s>", special=("<|tool|>",)),
        "c": sentencepiece_tokenizer(ENGLISH, size=420),
    }
    paths = {
        name: save(folder / name, make_model(tokenizer, seed=seed), tokenizer)
        for seed, (name, tokenizer) in enumerate(tokenizers.items())
    }
    donor = sentencepiece_tokenizer(PYTHON, size=400)
    for name, tied in (("tied_donor", True), ("untied_donor", False)):
        model = make_model(donor, architecture="mistral", hidden=24, tied=tied, seed=9)
        paths[name] = save(folder / name, model, donor)
    return paths


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of targets of every solve."""
    counted: list[int] = []
    original = tasks.solve_with_cache

    def counting(targets: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(targets))
        return original(targets, *args, **kwargs)

    monkeypatch.setattr(tasks, "solve_with_cache", counting)
    return counted


def transplant(model: Path, donor: Path, out: Path, **parameters: Any) -> dict[str, torch.Tensor]:
    recipe = {"merge_method": "omp", "models": [{"model": str(model)}], "tokenizer": {"source": str(donor)}}
    return run({**recipe, "parameters": {"k": K, **parameters}, "dtype": "float32"}, out)


def linear(inputs: list[Path], source: Path | str, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "omp_linear",
        "models": [{"model": str(path)} for path in inputs],
        "tokenizer": {"source": str(source)},
        "parameters": {"k": K, "weight": 0.5},
        "dtype": "float32",
        **more,
    }


# Tokenizer sources


def test_source_among_the_inputs(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that the source keeps its rows, and that the other input is realigned with the source as the donor."""
    result = run(linear([models["a"], models["b"]], models["a"]), tmp_path / "out")
    realigned = transplant(models["b"], models["a"], tmp_path / "b")
    for name in (EMBED, HEAD):
        torch.testing.assert_close(result[name], (tensors_of(models["a"])[name] + realigned[name]) / 2)


def test_source_base(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that ``base`` means the base model's tokenizer, with the base as the donor."""
    inputs = [models["a"], models["b"]]
    result = run(linear(inputs, "base", base_model=str(models["b"])), tmp_path / "out")
    expected = run(linear(inputs, models["b"]), tmp_path / "expected")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().keys() >= {"<|tool|>"}
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def test_union_of_three_vocabularies(models: dict[str, Path], tmp_path: Path, solves: list[int]) -> None:
    """Check that every token has a row, and that missing rows come from the base, then in recipe order."""
    inputs = [models["a"], models["b"], models["c"]]
    result = run(linear(inputs, "union", base_model=str(models["a"])), tmp_path / "out")
    vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in inputs]
    output = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert output.keys() == set().union(*vocabularies)
    assert result[EMBED].shape[0] == len(output)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == len(output)
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 0)

    rows = [tensors_of(path)[EMBED] for path in inputs]
    everywhere = [token for token in vocabularies[0] if all(token in v for v in vocabularies) and token.isalpha()]
    assert len(everywhere) > 20
    for token in everywhere:
        mean = sum(row[v[token]] for row, v in zip(rows, vocabularies, strict=True)) / 3
        torch.testing.assert_close(result[EMBED][output[token]], mean)
    # Each input lacks tokens of the two others: two solves each, for the input embedding and for the head.
    assert len(solves) == 3 * 2 * 2


def test_union_of_equal_vocabularies_is_the_plain_merge(models: dict[str, Path], tmp_path: Path) -> None:
    inputs = [models["a"], models["a1"]]
    result = run(linear(inputs, "union"), tmp_path / "out")
    plain = linear(inputs, "union", merge_method="linear", parameters={"weight": 0.5})
    expected = run(plain, tmp_path / "plain")
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


# Parameters


def test_k_by_model_slice_and_filter(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that a model's own k precedes the global one, and that a filter sets another k for the head."""
    donor = models["untied_donor"]
    recipe = linear([models["a"], models["b"]], donor)
    recipe["models"][1]["parameters"] = {"k": [{"filter": "lm_head", "value": 2}, {"value": 9}]}
    result = run(recipe, tmp_path / "out")
    a = transplant(models["a"], donor, tmp_path / "a")
    b_input = transplant(models["b"], donor, tmp_path / "b9", k=9)
    b_head = transplant(models["b"], donor, tmp_path / "b2", k=2)
    torch.testing.assert_close(result[EMBED], (a[EMBED] + b_input[EMBED]) / 2)
    torch.testing.assert_close(result[HEAD], (a[HEAD] + b_head[HEAD]) / 2)


# Overrides


def test_overrides_win(models: dict[str, Path], tmp_path: Path) -> None:
    """Check the rows of ``tokenizer.tokens``, which with ``force`` also replace rows that the model has."""
    a, donor = models["a"], models["untied_donor"]
    before, vocabulary = tensors_of(a), AutoTokenizer.from_pretrained(a).get_vocab()
    plain = transplant(a, donor, tmp_path / "plain")
    output = AutoTokenizer.from_pretrained(donor).get_vocab()
    new = next(t for t in output if "▁" + t.strip("▁") == t and t.replace("▁", "Ġ") not in vocabulary and len(t) > 4)
    tokens = {
        new: {"source": {"kind": "model_token", "model": str(a), "token": "Ġriver"}},
        "e": {"source": {"kind": "zero"}, "force": True},
        "r": {"source": {"kind": "zero"}},
        "<added>": {"source": {"kind": "model_token", "model": str(a), "token_id": 7}},
    }
    recipe = linear([a], donor, merge_method="omp", tokenizer={"source": str(donor), "tokens": tokens})
    recipe["parameters"] = {"k": K}
    result = run(recipe, tmp_path / "out")
    output = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    for name in (EMBED, HEAD):
        assert torch.equal(result[name][output[new]], before[name][vocabulary["Ġriver"]])
        assert not result[name][output["e"]].any()
        assert torch.equal(result[name][output["r"]], before[name][vocabulary["r"]]), "kept without force"
        assert torch.equal(result[name][output["<added>"]], before[name][7])
        others = [id_ for token, id_ in output.items() if token not in tokens]
        assert torch.equal(result[name][others], plain[name][others])


@pytest.mark.parametrize("source", ["a", "b"])
def test_an_override_from_any_slice(models: dict[str, Path], tmp_path: Path, source: str) -> None:
    """Check a source that another slice has: the first slice makes the embedding, and the last the head."""
    slices = [
        {"sources": [{"model": str(models["a"]), "layer_range": [0, 1]}]},
        {"sources": [{"model": str(models["b"]), "layer_range": [1, 2]}]},
    ]
    override = {"source": {"kind": "model_token", "model": str(models[source]), "token_id": 7}}
    tokenizer = {"source": str(models["untied_donor"]), "tokens": {"<added>": override}}
    recipe = {"merge_method": "omp_passthrough", "slices": slices, "tokenizer": tokenizer}
    result = run({**recipe, "parameters": {"k": K}, "dtype": "float32"}, tmp_path / "out")
    row = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["<added>"]
    for name in (EMBED, HEAD):
        assert torch.equal(result[name][row], tensors_of(models[source])[name][7])


# Structure


def test_slices_and_frankenmerge(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that a frankenmerge has its embedding from the first slice and its head from the last."""
    donor = models["untied_donor"]
    slices = [
        {"sources": [{"model": str(models["a"]), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(models["b"]), "layer_range": [1, 2], "parameters": {"k": 3}}]},
    ]
    recipe = {"merge_method": "omp_passthrough", "slices": slices, "tokenizer": {"source": str(donor)}}
    result = run({**recipe, "parameters": {"k": K}, "dtype": "float32"}, tmp_path / "out")
    a, b = transplant(models["a"], donor, tmp_path / "a"), transplant(models["b"], donor, tmp_path / "b", k=3)
    assert torch.equal(result[EMBED], a[EMBED])
    assert torch.equal(result[HEAD], b[HEAD])
    layer = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(result[layer.format(2)], tensors_of(models["b"])[layer.format(1)])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3


@pytest.mark.parametrize("structure", ["models", "slices"])
@pytest.mark.parametrize("first", ["a", "a1"])
def test_the_first_model_is_the_base_without_base_model(
    models: dict[str, Path], tmp_path: Path, structure: str, first: str
) -> None:
    """Check in both orders: mergekit chooses the model of config.json, further files and a template by a hash."""
    inputs = []
    for name, theta in ((first, 1e4), ({"a": "a1", "a1": "a"}[first], 2e4)):
        inputs.append(Path(shutil.copytree(models[name], tmp_path / name)))
        path = inputs[-1] / "config.json"
        settings = json.loads(path.read_text())
        (inputs[-1] / "chat_template.jinja").write_text(f"{{{{ messages }}}} {theta}")
        rope = {"rope_type": "default", "rope_theta": theta}
        path.write_text(json.dumps(settings | {"rope_parameters": rope, "max_position_embeddings": int(theta)}))
    parameters = {"approximation": "mean", "weight": 0.5}
    recipe = linear(inputs, models["b"], parameters=parameters, chat_template="auto")
    if structure == "slices":
        slices = [{"sources": [{**entry, "layer_range": [0, 1]}]} for entry in recipe.pop("models")]
        recipe |= {"merge_method": "omp_passthrough", "slices": slices, "parameters": {"approximation": "mean"}}
    run(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["rope_parameters"]["rope_theta"], config["max_position_embeddings"]) == (1e4, 10_000)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }} 10000.0"
    donor, _folder = _get_donor_model(MergeConfiguration.model_validate(recipe), MergeOptions())
    assert donor.model.path == str(inputs[0])


def test_modules(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = linear([models["a"], models["b"]], models["untied_donor"])
    expected = run(recipe, tmp_path / "models")
    recipe["modules"] = {"default": {"models": recipe.pop("models")}}
    result = run(recipe, tmp_path / "modules")
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def test_lora_reference(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that ``model+lora`` is merged by mergekit, then realigned."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["embed_tokens", "up_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models["a"]), config)
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(models["a"]).save_pretrained(tmp_path / "merged")

    reference = Path(f"{models['a']}+{tmp_path / 'lora'}")
    recipe = linear([reference], models["untied_donor"], merge_method="omp")
    recipe["parameters"] = {"k": K}
    result = run(recipe, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
    expected = transplant(tmp_path / "merged", models["untied_donor"], tmp_path / "expected")
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor)


def test_dtypes(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that arithmetic uses ``dtype`` and the output ``out_dtype``."""
    recipe = linear([models["a"], models["b"]], models["untied_donor"])
    full = run(recipe, tmp_path / "float32")
    half = run({**recipe, "out_dtype": "float16"}, tmp_path / "float16")
    assert all(tensor.dtype == torch.float16 for tensor in half.values())
    assert all(torch.equal(full[name].half(), tensor) for name, tensor in half.items())
    brain = run({**recipe, "dtype": "bfloat16"}, tmp_path / "bfloat16")
    assert brain[EMBED].dtype == torch.bfloat16
    torch.testing.assert_close(brain[EMBED].float(), full[EMBED], rtol=0.05, atol=1e-3)


def test_mixture_of_experts(models: dict[str, Path], tmp_path: Path) -> None:
    paths = []
    for seed, tokenizer in enumerate(
        [byte_level_tokenizer(ENGLISH, size=400), byte_level_tokenizer(PYTHON, size=360)]
    ):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=len(tokenizer.get_vocab()),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
        paths.append(save(tmp_path / f"moe{seed}", MixtralForCausalLM(config), tokenizer))
    run(linear(paths, models["untied_donor"]), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


# Shared solves


@pytest.mark.parametrize(("donor", "expected"), [("tied_donor", 1), ("untied_donor", 2)])
def test_three_fine_tunes_share_their_solves(
    models: dict[str, Path], tmp_path: Path, solves: list[int], donor: str, expected: int
) -> None:
    """Check one solve for three inputs of one vocabulary, or two if the donor's head is another matrix."""
    run(linear([models["a"], models["a1"], models["a2"]], models[donor]), tmp_path / "out")
    assert len(solves) == expected


def test_another_k_or_vocabulary_is_another_solve(models: dict[str, Path], tmp_path: Path, solves: list[int]) -> None:
    recipe = linear([models["a"], models["a1"], models["b"]], models["tied_donor"])
    recipe["models"][1]["parameters"] = {"k": 3}
    run(recipe, tmp_path / "out")
    assert len(solves) == 3


def test_the_source_among_the_inputs_needs_no_solve(
    models: dict[str, Path], tmp_path: Path, solves: list[int]
) -> None:
    run(linear([models["a"], models["a1"]], models["a"]), tmp_path / "out")
    assert solves == []


# Around the recipe


def test_methods_that_are_registered_later(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that methods of other plugins are available, unless they have a parameter k."""

    @merge_method(name="first_input")
    def first_input(group: TensorGroup) -> torch.Tensor:
        return group.entries[0].tensor

    @merge_method(name="uses_k")
    def uses_k(group: TensorGroup, k: int = 3) -> torch.Tensor:
        return group.entries[0].tensor

    registered = merge_methods.registry._METHODS
    try:
        merge_methods.register(first_input)
        merge_methods.register(uses_k)
        recipe = linear([models["a"], models["b"]], models["untied_donor"], merge_method="omp_first_input")
        recipe["parameters"] = {"k": K}
        result = run(recipe, tmp_path / "out")
        assert torch.equal(result[EMBED], transplant(models["a"], models["untied_donor"], tmp_path / "a")[EMBED])
        with pytest.raises(
            ValueError, match="omp_uses_k is not available, since the parameters k of uses_k have another meaning"
        ):
            run({**recipe, "merge_method": "omp_uses_k"}, tmp_path / "refused")
    finally:
        for name in ("first_input", "omp_first_input", "uses_k"):
            registered.pop(name, None)


def test_in_memory_plan_gives_the_same_tensors(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan in memory, as mergekit-evolve does with the same planner.

    mergekit 0.1.5's ReturnTensor requires a ``Task[Tensor]``, which none of its merge tasks is, so pydantic rejects
    every in-memory plan, for any method. Here it accepts any task.
    """

    class ReturnAnyTensor(ReturnTensor):
        tensor_task: Task

    monkeypatch.setattr(plan, "ReturnTensor", ReturnAnyTensor)
    recipe = linear([models["a"], models["b"]], models["untied_donor"])
    expected = run(recipe, tmp_path / "out")
    config, options = MergeConfiguration.model_validate(recipe), MergeOptions(quiet=True)
    LoaderCache().setup(options)
    architecture = get_architecture_info(config, options)
    planner = plan.MergePlanner(config, architecture, options, _model_out_config(config, architecture))
    planned = planner.plan_in_memory()
    result = {task.weight_info.name: value for task, value in Executor(planned).run(quiet=True)}
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_memory": True},
        {"read_to_gpu": True},
        {"async_write": True, "write_threads": 2, "out_shard_size": 20_000},
        {"clone_tensors": True},
        {"safe_serialization": False},
        {"lazy_unpickle": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_run_options_change_nothing(models: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    """Check on the CPU; the meaning of these options on a GPU needs one."""
    recipe = linear([models["a"], models["b"]], models["untied_donor"])
    expected = run(recipe, tmp_path / "expected")
    result = run(recipe, tmp_path / "out", **options)
    if not result:
        result = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def test_how_to_solve_reaches_the_solver(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a memory budget does not change the result, and that --multi-gpu uses every device."""
    asked: list[dict[str, Any]] = []
    original = tasks.solve_with_cache

    def watching(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return original(*args, **kwargs)

    free = transplant(models["a"], models["tied_donor"], tmp_path / "free")
    monkeypatch.setattr(tasks, "solve_with_cache", watching)
    tight = transplant(models["a"], models["tied_donor"], tmp_path / "tight", memory_budget="1MiB")
    assert asked[0]["memory_budget"] == 2**20
    assert asked[0]["devices"] is None
    assert all(torch.equal(free[name], tensor) for name, tensor in tight.items())
    assert tasks._all_like(torch.device("cpu")) is None
