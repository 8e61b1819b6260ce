"""Test that a base with image input keeps its processor."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, save, sentencepiece_tokenizer
from helpers.commands import merge_here, recipe
from helpers.tokenizers_for_tests import package_file
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GPTSw3Tokenizer,
)

from mergekit_omp.recipe.resolve import resolve
from mergekit_omp.report.warnings import warnings_for

NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
SOFT_TOKENS = 4
IMAGE_PROCESSOR = getattr(transformers, "Gemma3ImageProcessorPil", None) or transformers.Gemma3ImageProcessor


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a small Gemma 3 with image input and its processor, and a text-only donor."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = byte_level_tokenizer(ENGLISH, size=350, special=tuple(NAMED.values()))
    tokenizer.save_pretrained(folder / "base")
    config_file = folder / "base/tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | NAMED))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    attention = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=attention
        | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "tie_word_embeddings": True},
        vision_config=attention | {"image_size": 28, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=SOFT_TOKENS,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder / "base")
    tensors = load_file(folder / "base/model.safetensors")  # named as published checkpoints name them
    named = {
        re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): tensors[name]
        for name in tensors
    }
    save_file(named, folder / "base/model.safetensors", {"format": "pt"})
    images = IMAGE_PROCESSOR(size={"height": 28, "width": 28})
    Gemma3Processor(images, tokenizer, image_seq_length=SOFT_TOKENS).save_pretrained(folder / "base")
    donor_tokenizer = sentencepiece_tokenizer(PYTHON)
    donor = save(folder / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=24), donor_tokenizer)
    return folder / "base", donor


def inputs_of(folder: Path) -> dict[str, Any]:
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.full((30, 40, 3), 128, dtype=np.uint8))
    return processor(text=f"the river {NAMED['boi_token']} and", images=image, return_tensors="pt")


def test_processor_loads_and_finds_its_tokens(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Add image tokens in the recipe: equal pixels, ids as in config.json, and a model that runs."""
    base, donor = pair
    given = recipe(base, donor)
    given["tokenizer"]["tokens"] = {text: {"source": str(base)} for text in NAMED.values()}
    out = tmp_path / "out"
    result = merge_here(given, out, "--quiet")
    assert result.exit_code == 0, result.output
    before, after = inputs_of(base), inputs_of(out)
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    tokenizer, config = AutoTokenizer.from_pretrained(out), json.loads((out / "config.json").read_text())
    assert {name: getattr(tokenizer, name) for name in NAMED} == NAMED
    for name, key in (("boi", "boi_token_index"), ("eoi", "eoi_token_index"), ("image", "image_token_id")):
        stated = config.get(key, config.get(key.replace("_id", "_index")))
        assert stated == tokenizer.get_vocab()[NAMED[f"{name}_token"]]
    assert int((after["input_ids"] == tokenizer.image_token_id).sum()) == SOFT_TOKENS
    model = AutoModelForImageTextToText.from_pretrained(out)
    with torch.no_grad():
        assert torch.isfinite(model(**after).logits).all()


def test_a_donor_without_tokenizer_json(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Check a tokenizer whose special tokens transformers 5 writes as a list."""
    pieces = str(package_file("mistral_common", "data/tokenizer.model.v1"))
    GPTSw3Tokenizer(pieces, extra_special_tokens=["<|extra|>"]).save_pretrained(tmp_path / "donor")
    assert not (tmp_path / "donor/tokenizer.json").exists()
    given = recipe(pair[0], tmp_path / "donor", parameters={"approximation": "mean"})
    given["tokenizer"]["tokens"] = {text: {"source": str(pair[0])} for text in NAMED.values()}
    result = merge_here(given, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {name: getattr(tokenizer, name) for name in NAMED} == NAMED
    assert "<|extra|>" in tokenizer.all_special_tokens


def test_missing_image_tokens_are_reported(pair: tuple[Path, Path]) -> None:
    base, donor = pair

    def warnings_with(tokens: dict[str, Any] | None) -> list[str]:
        config = MergeConfiguration(
            merge_method="omp", models=[{"model": str(base)}], tokenizer={"source": str(donor), "tokens": tokens}
        )
        transplant = resolve(config, MergeOptions())
        return [s for s in warnings_for(transplant.base, transplant) if "processor" in s]

    assert warnings_with(None) == [
        f"{base}: it has image or audio input, and its processor needs '<end_of_image>', '<image_soft_token>', "
        "'<start_of_image>', which the output vocabulary lacks; add them to tokenizer.tokens, such as "
        f"`<end_of_image>: {{source: {base}}}`."
    ]
    assert warnings_with({text: {"source": str(base)} for text in NAMED.values()}) == []


def test_the_old_vocabulary_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that vocab.json, which mergekit copies for some architectures, is removed."""
    tokenizer, donor_tokenizer = byte_level_tokenizer(ENGLISH, size=300), sentencepiece_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(tokenizer), tokenizer)
    donor = save(tmp_path / "donor", make_model(donor_tokenizer), donor_tokenizer)
    (base / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    [llama] = NAME_TO_ARCH["LlamaForCausalLM"]
    monkeypatch.setitem(llama.__dict__, "tagalong_files", ["vocab.json"])
    assert merge_here(recipe(base, donor), tmp_path / "out", "--quiet").exit_code == 0
    assert not (tmp_path / "out/vocab.json").exists()
