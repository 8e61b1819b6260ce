"""Test ``model+adapter`` as an input: adapters that train vocabulary rows, and those that PEFT cannot merge."""

from collections.abc import Iterable
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
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import merge_here, recipe, refusal
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base_tokenizer, donor_tokenizer = byte_level_tokenizer(ENGLISH, size=400), sentencepiece_tokenizer(PYTHON)
    return (
        save(folder / "base", make_model(base_tokenizer), base_tokenizer),
        save(folder / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=24), donor_tokenizer),
    )


def adapted(base: Path, out: Path, added: Iterable[str] = (), **settings: Any) -> PreTrainedModel:
    """Train an adapter (with noise) after adding ``added`` tokens, save it, and return the merged model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if tokenizer.add_tokens(list(added)):
        model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(r=2, init_lora_weights=False, **({"target_modules": ["up_proj"]} | settings))
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    wrapped.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return wrapped.merge_and_unload()


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [5, 6, 7]}]
)
def test_adapters_that_train_rows(tmp_path: Path, pair: tuple[Path, Path], settings: dict[str, Any]) -> None:
    """Compare with a transplant of the merged model."""
    base, donor = pair
    merged = adapted(base, tmp_path / "adapter", **settings)
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    assert not torch.equal(merged.get_input_embeddings().weight, tensors_of(base)["model.embed_tokens.weight"])

    cache = ("--lora-merge-cache", str(tmp_path / "cache"))
    result = merge_here(recipe(f"{base}+{tmp_path / 'adapter'}", donor), tmp_path / "out", "--quiet", *cache)
    assert result.exit_code == 0, result.output
    assert merge_here(recipe(tmp_path / "merged", donor), tmp_path / "expected", "--quiet").exit_code == 0
    expected, found = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize(
    "settings",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "lm_head"]}],
    ids=["saved whole", "modules_to_save", "low rank"],
)
def test_an_adapter_with_added_tokens_is_refused_with_advice(
    tmp_path: Path, pair: tuple[Path, Path], settings: dict[str, Any]
) -> None:
    """Check that the recipe is rejected before any work, and that the advice of the message works."""
    base, donor = pair
    adapter = tmp_path / "adapter"
    merged = adapted(base, adapter, ["<|im_start|>", "<|im_end|>"], **settings)
    given, out = recipe(f"{base}+{adapter}", donor), tmp_path / "out"
    rows = len(AutoTokenizer.from_pretrained(base))
    assert refusal(given, out, "--lora-merge-cache", str(tmp_path / "cache")) == (
        f"models[0].model: the adapter {adapter} has {rows + 2} rows for the vocabulary, and {base} has {rows}: it "
        "was trained after tokens had been added, but mergekit does not resize the model. Resize the "
        f"model to {rows + 2} rows with transformers, merge the adapter with PEFT's merge_and_unload, save the result "
        "with the adapter's tokenizer, and name that folder."
    )
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(adapter).save_pretrained(tmp_path / "merged")
    assert merge_here(recipe(tmp_path / "merged", donor), out, "--quiet").exit_code == 0


def test_invalid_adapters(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, donor = pair
    given, cache = recipe(f"{base}+{donor}", donor), ("--lora-merge-cache", str(tmp_path / "cache"))
    assert refusal(given, tmp_path / "out", *cache) == (
        f"models[0].model: {donor} has no adapter_config.json; name a PEFT adapter after the +."
    )
    assert refusal(given, tmp_path / "out") == (
        f"models[0].model: mergekit merges {base}+{donor} into a folder first; name one with --lora-merge-cache "
        "<folder>."
    )
