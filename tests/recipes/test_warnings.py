"""Test the warnings about a pair of tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import PYTHON, byte_level_tokenizer, make_model, save
from helpers.commands import merge_here, recipe
from helpers.tokenizers_for_tests import llama3
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from mergekit_omp.checkpoints.architecture import is_tied, position_settings
from mergekit_omp.recipe.resolve import resolve
from mergekit_omp.report.forecast import forecast
from mergekit_omp.report.forecast_text import describe_forecast
from mergekit_omp.report.tables import render
from mergekit_omp.report.warnings import warnings_for


def advice_for(base: Path, donor: Path, tokens: dict | None = None, **more: Any) -> list[str]:
    tokenizer = {"source": str(donor), "tokens": tokens}
    config = MergeConfiguration(merge_method="omp", models=[{"model": str(base)}], tokenizer=tokenizer, **more)
    transplant = resolve(config, MergeOptions())
    return warnings_for(transplant.base, transplant)


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


@pytest.mark.parametrize("output_has", [True, False])
def test_a_missing_bos_is_reported(tmp_path: Path, output_has: bool) -> None:
    base = with_bos(byte_level_tokenizer(size=300))
    donor = byte_level_tokenizer(PYTHON, size=300, eos="</s>")
    donor = with_bos(donor) if output_has else donor
    paths = [save(tmp_path / name, make_model(t), t) for name, t in (("base", base), ("donor", donor))]
    expected = [
        f"{paths[0]}: it was trained with '<|endoftext|>' at the start of every text, and its own tokenizer adds it; "
        "the output tokenizer does not, so start prompts with '</s>'."
    ]
    assert [s for s in advice_for(*paths) if "start prompts" in s] == ([] if output_has else expected)


def test_other_numerals_are_reported(tmp_path: Path, smollm2_dir: Path) -> None:
    """Check Llama 3, which writes chunks of three digits, and SmolLM2, which learnt single digits."""
    folder = tmp_path / "llama3"
    llama3().save_pretrained(folder)
    [warnings] = [
        s for s in advice_for(smollm2_dir, folder, parameters={"approximation": "subword"}) if "numbers" in s
    ]
    assert "chunks of up to three digits from the left" in warnings
    assert "single digits" in warnings
    assert advice_for(smollm2_dir, smollm2_dir) == []


def test_a_tokenizer_that_cannot_write_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check a finished run whose warnings cannot be told: Unigram without an unknown token fails at other text."""
    letters = [(chr(letter), -1.0) for letter in range(ord("a"), ord("z") + 1)]
    donor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([*letters, ("the", -1.0)])))
    base = byte_level_tokenizer(size=300)
    paths = [save(tmp_path / name, make_model(t), t) for name, t in (("base", base), ("donor", donor))]
    result = merge_here(recipe(*paths, parameters={"approximation": "mean"}), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/out has the model: 27 tokens" in caplog.text


def test_tokens_of_the_chat_template_without_a_row_are_reported(tmp_path: Path) -> None:
    """Check the names of the template's tokens without a row, except those that the recipe gives a row."""
    base = byte_level_tokenizer(size=300, special=("<|im_start|>",))
    donor = byte_level_tokenizer(PYTHON, size=300, special=("<|im_start|>", "<|tool|>", "<|role|>", "<|extra_0|>"))
    donor.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|tool|><|role|>{% endfor %}"
    paths = [save(tmp_path / name, make_model(t), t) for name, t in (("base", base), ("donor", donor))]

    def warnings(**more: object) -> list[str]:
        return [s.split(", whose")[0] for s in advice_for(*paths, **more) if "chat template" in s]

    assert warnings() == [f"{paths[0]}: the chat template writes '<|tool|>', '<|role|>'"]
    assert warnings(tokens={"<|tool|>": {"source": {"kind": "zero"}}}) == [
        f"{paths[0]}: the chat template writes '<|role|>'"
    ]
    other = "{% for m in messages %}<|im_start|>{{ m.content }}<|extra_0|>{% endfor %}"
    assert warnings(chat_template=other) == [f"{paths[0]}: the chat template writes '<|extra_0|>'"]
    assert warnings(chat_template="{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}") == []


def test_inputs_with_other_positions_are_reported(tmp_path: Path) -> None:
    """Check the settings in the run's warnings and in ``inspect``, and no warning for equal settings."""
    tokenizer, donor = byte_level_tokenizer(size=300), byte_level_tokenizer(PYTHON, size=300, eos="</s>")
    paths = {name: save(tmp_path / name, make_model(tokenizer), tokenizer) for name in ("base", "like", "other")}
    paths["donor"] = save(tmp_path / "donor", make_model(donor), donor)
    file = paths["other"] / "config.json"
    settings = json.loads(file.read_text())
    settings["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    file.write_text(json.dumps(settings | {"max_position_embeddings": 8192}))

    config = MergeConfiguration(
        merge_method="omp_linear",
        base_model=str(paths["base"]),
        models=[{"model": str(paths[name]), "parameters": {"weight": 0.3}} for name in ("base", "like", "other")],
        tokenizer={"source": str(paths["donor"])},
    )
    transplant = resolve(config, MergeOptions())
    warnings = [s for model in transplant.inputs for s in warnings_for(model, transplant) if "position settings" in s]
    assert warnings == [
        f"{paths['other']}: its position settings differ from those of {paths['base']}: rope_type linear instead of "
        "default, factor 4.0 instead of None, rope_theta 500000.0 instead of 10000.0, max_position_embeddings 8192 "
        f"instead of 2048. The output has those of {paths['base']}, so the contribution of this model may lose "
        "quality, above all in long texts."
    ]
    found = forecast(transplant, measure=False)
    assert warnings[0] in next(model for model in found["inputs"] if model["name"] == str(paths["other"]))["advice"]
    assert warnings[0] in " ".join(render(*describe_forecast(found)).split())


@pytest.mark.parametrize(
    ("model_type", "settings", "tied"),
    [
        ("llama", {"tie_word_embeddings": True}, True),
        ("llama", {}, False),
        ("qwen2_5_vl", {"tie_word_embeddings": True}, True),
        ("gemma3", {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ("mllama", {"text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_what_ties_the_head(model_type: str, settings: dict[str, Any], tied: bool) -> None:
    """Check models with image input, which say it at the top of config.json, or for their text model, or both."""
    assert is_tied(AutoConfig.for_model(model_type, **settings)) is tied


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            {"full_attention.rope_theta": 1e6, "sliding_attention.rope_theta": 1e4},
        ),
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5, "rope_type": "default"}),
    ],
)
def test_position_settings_of_models_with_several_types_of_layers(
    rope: dict[str, Any], expected: dict[str, float]
) -> None:
    config = PretrainedConfig(max_position_embeddings=512)
    config.rope_parameters = rope
    assert position_settings(config) == expected | {"max_position_embeddings": 512}
