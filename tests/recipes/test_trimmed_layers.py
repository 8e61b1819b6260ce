"""Test slices that omit layers in a recipe with a transplant, as for draft models."""

import json
from pathlib import Path

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
from helpers.commands import merge_here, recipe
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LAYERS = [0, 1, 2, 5, 6, 6, 7]
TYPES = [*["sliding_attention"] * 2, "full_attention", "full_attention", *["sliding_attention"] * 3, "full_attention"]


def gemma3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(TYPES),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=TYPES,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_layers_of_slices(tmp_path: Path, architecture: str) -> None:
    """Check that the output has these layers with their types, and loads; one layer is repeated."""
    tokenizer, donor_tokenizer = byte_level_tokenizer(ENGLISH, size=350), sentencepiece_tokenizer(PYTHON)
    makers = {"gemma3": gemma3}
    model = makers.get(architecture, lambda t: make_model(t, architecture=architecture, layers=len(TYPES)))(tokenizer)
    base = save(tmp_path / "base", model, tokenizer)
    donor = save(tmp_path / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=24), donor_tokenizer)
    ranges = [[0, 3], [5, 7], [6, 8]]
    slices = [{"sources": [{"model": str(base), "layer_range": layers}]} for layers in ranges]
    trimmed = {key: value for key, value in recipe(base, donor).items() if key != "models"} | {"slices": slices}
    out = tmp_path / "out"
    result = merge_here(trimmed, out, "--quiet", "--clone-tensors")
    assert result.exit_code == 0, result.output

    before, after = tensors_of(base), tensors_of(out)
    for place, layer in enumerate(LAYERS):
        names = [name for name in before if f"layers.{layer}." in name]
        assert names
        for name in names:
            assert torch.equal(before[name], after[name.replace(f"layers.{layer}.", f"layers.{place}.")])
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == len(LAYERS)
    if architecture == "gemma3":
        assert config["layer_types"] == [TYPES[layer] for layer in LAYERS]
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.tensor([[1, 2, 300]])).logits).all()
