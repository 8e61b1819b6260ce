"""``mergekit-omp init``: the recipe that it writes is true of both models, and runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import merge_here
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergekit_omp.cli.main import main

EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose path needs quotes in YAML, and a donor with special tokens that need some in a comment."""
    folder = tmp_path_factory.mktemp("models")
    base, donor = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON, special=("<|a: #'\x07|>", "[INST]"))
    return (
        save(folder / "base: #1", make_model(base, seed=1, dtype=torch.bfloat16), base),
        save(folder / "donor", make_model(donor, hidden=24, tied=True), donor),
    )


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, arguments)])


def written(*arguments: str | Path) -> str:
    """The recipe that a call which must succeed prints."""
    result = init(*arguments, "-o", "-")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_recipe_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = init(*pair, "--out", tmp_path / "my recipe.yml")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "my recipe.yml").read_text()
    assert yaml.safe_load(text) == {
        "merge_method": "omp",
        "models": [{"model": str(pair[0])}],
        "tokenizer": {"source": str(pair[1])},
        "parameters": {"k": 64},
        "dtype": "bfloat16",
    }
    assert f"mergekit-yaml '{tmp_path}/my recipe.yml' out " in result.stdout, "what to do next"
    merged = merge_here(text, tmp_path / "out", "--quiet")
    assert merged.exit_code == 0, merged.output
    assert tensors_of(tmp_path / "out")[EMBED].dtype == torch.bfloat16


def test_comments_say_what_inspect_finds(pair: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(main, ["inspect", *map(str, pair), "--json", "--no-time"])
    found = json.loads(result.stdout)
    [model] = found["inputs"]
    said = " ".join(re.sub(r"^ *# ?", "", line) for line in written(*pair).splitlines())
    said = " ".join(said.split())
    assert f"{model['kept']:,} of {found['tokens']:,} output tokens are shared" in said
    assert f"{model['lacking']:,} tokens are new, for example {model['examples'][0]}" in said
    assert "<|endoftext|> (<eos>)" in said
    assert "separate in the base and tied in the donor: one solve serves both" in said
    assert "Numbers: both tokenizers write chunks of varying length." in said
    assert model["advice"]
    for sentence in model["advice"]:
        assert f"Note: {sentence}" in said


def test_the_override_in_a_comment_works(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Without its comment signs, the first special token that the base lacks gets the row of the base's eos."""
    text = written(*pair)
    commented = text[text.index("  # tokens:") : text.index("parameters:")]
    recipe = text.replace(commented, commented.replace("  # ", "  "))
    [token] = yaml.safe_load(recipe)["tokenizer"]["tokens"]
    assert token == "<|a: #'\x07|>"
    merged = merge_here(recipe, tmp_path / "out", "--quiet")
    assert merged.exit_code == 0, merged.output
    ours, base = tensors_of(tmp_path / "out")[EMBED], tensors_of(pair[0])[EMBED]
    donor = byte_level_tokenizer(PYTHON, special=(token, "[INST]"))
    assert torch.equal(ours[donor.convert_tokens_to_ids(token)], base[1]), "<eos> of the base"


def test_a_donor_without_a_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    byte_level_tokenizer(PYTHON).save_pretrained(tmp_path / "alone")
    text = written(pair[0], tmp_path / "alone")
    assert yaml.safe_load(text)["parameters"] == {"approximation": "subword"}
    assert "a tokenizer without a model" in text
    merged = merge_here(text, tmp_path / "out", "--quiet")
    assert merged.exit_code == 0, merged.output


@pytest.mark.parametrize("digits", ["base", "donor"])
def test_numbers_that_are_split_differently(tmp_path: Path, digits: str) -> None:
    """Rows of long numbers are made from digits where the base knows digits alone, and only there."""
    folders = {}
    for name, corpus in (("base", ENGLISH), ("donor", PYTHON)):
        tokenizer = byte_level_tokenizer(corpus)
        if name == digits:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        folders[name] = save(tmp_path / name, make_model(tokenizer), tokenizer)
    text = written(folders["base"], folders["donor"])
    parameters: dict[str, Any] = yaml.safe_load(text)["parameters"]
    assert parameters.get("numerals") == ("digits" if digits == "base" else None)
    assert "Numbers: the base writes" in text
    merged = merge_here(text, tmp_path / "out", "--quiet")
    assert merged.exit_code == 0, merged.output


def test_few_anchors_bound_k(tmp_path: Path) -> None:
    """Two vocabularies of whole words share a handful of tokens; k is no larger than that."""
    folders = []
    for name, words in (("base", "a b c d e f"), ("donor", "a b c x y z")):
        vocabulary = {word: id_ for id_, word in enumerate(["<unk>", *words.split()])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")
        folders.append(save(tmp_path / name, make_model(tokenizer), tokenizer))
    text = written(*folders)
    assert yaml.safe_load(text)["parameters"]["k"] < 5
    merged = merge_here(text, tmp_path / "out", "--quiet")
    assert merged.exit_code == 0, merged.output


def test_json(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = init(*pair, "-o", tmp_path / "recipe.yml", "--json")
    said = json.loads(result.stdout)
    assert said == {"path": str(tmp_path / "recipe.yml"), "recipe": (tmp_path / "recipe.yml").read_text()}
    assert json.loads(init(*pair, "-o", "-", "--json").stdout)["path"] is None


def test_nothing_is_replaced_and_mistakes_are_sentences(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("mine")
    result = init(*pair, "-o", tmp_path / "recipe.yml")
    assert result.exit_code == 1
    assert "recipe.yml is there already" in result.stderr
    assert "name another file with --out" in result.stderr
    assert (tmp_path / "recipe.yml").read_text() == "mine"
    result = init(*pair, "-o", tmp_path / "missing" / "recipe.yml")
    assert result.exit_code == 1
    assert "cannot be written (No such file or directory)" in result.stderr
    result = init(tmp_path / "nowhere", pair[1], "-o", tmp_path / "new.yml")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: models[0].model: ")
    assert not (tmp_path / "new.yml").exists()
