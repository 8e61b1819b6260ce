"""Run the examples, and recipes of several stages, with the real commands."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    run_recipe,
    save,
    sentencepiece_tokenizer,
    tensors_of,
    word_files,
)
from helpers.commands import must_merge
from helpers.tiny_hypernetwork import save_hypernetwork
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_omp.healing.options import LEARNING_RATES, make_options

FOLDER = Path(__file__).parents[2] / "examples/yaml"
HEAL = FOLDER / "heal.yml"
EXAMPLES = sorted(set(FOLDER.glob("*.yml")) - {HEAL})
MODEL = re.compile(r"(?:model|source|base_model): ([\w./-]+)$", re.MULTILINE)
LAST_LAYER = re.compile(r"layer_range: \[\d+, (\d+)\]")
STAGE = re.compile(r"^name: (\S+)$", re.MULTILINE)


def small_checkpoint(hub_id: str, folder: Path, layers: int) -> Path:
    """Write a small llama for a hub id; models of one family share a vocabulary, others do not."""
    family = re.split(r"-Instruct|-Base|-beta|/zephyr|/Wizard|/OpenHermes", hub_id)[0]
    seed = sum(family.encode()) % 5
    special = ("<|im_start|>", "<|im_end|>", "<|eot_id|>")
    if "Qwen" in hub_id or "Hermes" in hub_id or "Llama" in hub_id:
        tokenizer = byte_level_tokenizer(ENGLISH, size=340 + 10 * seed, special=special)
    else:
        tokenizer = sentencepiece_tokenizer(PYTHON if seed % 2 else ENGLISH, size=380 + 10 * seed)
    model = make_model(tokenizer, seed=sum(hub_id.encode()), tied="Qwen" in hub_id, layers=layers)
    return save(folder / hub_id.replace("/", "--"), model, tokenizer)


def with_local_files(recipe: str, folder: Path) -> str:
    """Replace the files of a recipe, a corpus or word vectors, by small ones."""
    for key, path in word_files(folder).items():
        recipe = re.sub(rf"^  {key}: [\w.]+", f"  {key}: {path}", recipe, flags=re.MULTILINE)
    if "hypernetwork:" in recipe:
        path = Path(yaml.safe_load(recipe)["models"][0]["model"])
        width = AutoModelForCausalLM.from_pretrained(path).config.hidden_size
        save_hypernetwork(folder / "hypernetwork", AutoTokenizer.from_pretrained(path), n_embd=width)
        recipe = re.sub(r"hypernetwork: .+", f"hypernetwork: {folder / 'hypernetwork'}", recipe)
    return recipe


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    """Run every recipe in examples/yaml with small local checkpoints for its hub ids."""
    recipe = example.read_text()
    layers = max([2, *map(int, LAST_LAYER.findall(recipe))])
    for name in set(MODEL.findall(recipe)) - {*STAGE.findall(recipe), "base", "union"}:
        path = small_checkpoint(name, tmp_path, layers)
        recipe = re.sub(rf": {re.escape(name)}$", f": {path}", recipe, flags=re.MULTILINE)
    recipe = with_local_files(recipe, tmp_path)
    flags = ("--trust-remote-code",) if "--trust-remote-code" in recipe else ()
    out = tmp_path / "out"
    if len(list(yaml.safe_load_all(recipe))) > 1:
        multi(recipe, tmp_path / "stages", out)
    else:
        must_merge(recipe, out, *flags)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the river and 12 numbers", return_tensors="pt").input_ids
    assert int(ids.max()) < model.config.vocab_size
    assert torch.isfinite(model(ids).logits).all()


def test_heal_file() -> None:
    """Check heal.yml, which is not a merge recipe: its keys, its base, and the folder that it reads."""
    options = make_options(yaml.safe_load(HEAL.read_text()), str(HEAL))
    transplant = (FOLDER / "transplant.yml").read_text()
    assert options.base == yaml.safe_load(transplant)["models"][0]["model"]
    assert f"mergekit-yaml examples/yaml/transplant.yml {options.model}\n" in transplant
    assert options.seconds == 600
    assert options.learning_rate == LEARNING_RATES[options.train]


def multi(recipe: str, stages: Path, out: Path) -> None:
    result = run_recipe(
        recipe, stages, "--out-path", str(out), command="mergekit-multi", positional=("--intermediate-dir",)
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizers = {
        "a": byte_level_tokenizer(ENGLISH, size=400),
        "b": byte_level_tokenizer(PYTHON, size=360),
        "donor": sentencepiece_tokenizer(ENGLISH, size=420),
    }
    return {
        name: save(folder / name, make_model(tokenizer, seed=seed), tokenizer)
        for seed, (name, tokenizer) in enumerate(tokenizers.items())
    }


def test_stages_use_earlier_ones(models: dict[str, Path], tmp_path: Path) -> None:
    """Name an earlier stage as model and as tokenizer.source; a lazy re-run keeps finished stages."""
    stages = [
        {
            "name": "aligned",
            "merge_method": "omp",
            "models": [{"model": str(models["a"])}],
            "tokenizer": {"source": str(models["donor"])},
            "dtype": "float32",
        },
        {
            "merge_method": "omp_linear",
            "models": [{"model": "aligned"}, {"model": str(models["b"])}],
            "tokenizer": {"source": "aligned"},
            "parameters": {"weight": 0.5},
            "dtype": "float32",
        },
    ]
    recipe = yaml.safe_dump_all(stages)
    out, intermediate = tmp_path / "out", tmp_path / "stages"
    multi(recipe, intermediate, out)
    donor = AutoTokenizer.from_pretrained(models["donor"]).get_vocab()
    for folder in (intermediate / "aligned", out):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == donor
    first = tensors_of(out)
    written = (intermediate / "aligned/model.safetensors").stat().st_mtime_ns

    multi(recipe, intermediate, tmp_path / "again")
    assert (intermediate / "aligned/model.safetensors").stat().st_mtime_ns == written, "lazily kept"
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors_of(tmp_path / "again").items())
