"""Test tokens that no checkpoint has a row for: they get the mean row, and a warning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, merge, run, save, tensors_of
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from mergekit_omp.report.record import read_record

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ROWS = 400


def checkpoint(folder: Path, *added: str, seed: int, corpus: list[str] = ENGLISH) -> Path:
    """Write a model whose matrices were not resized after tokens had been added to its tokenizer."""
    tokenizer = byte_level_tokenizer(corpus, size=ROWS)
    model = make_model(tokenizer, seed=seed)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.pad_token = "[PAD]" if "[PAD]" in added else None
    return save(folder, model, tokenizer)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a base, a fine-tune with ``[PAD]`` beyond its rows, and a model with an image token beyond its rows."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": checkpoint(folder / "plain", seed=1),
        "pad": checkpoint(folder / "pad", "[PAD]", seed=2),
        "image": checkpoint(folder / "image", "<image_soft_token>", seed=3),
        "other": checkpoint(folder / "other", "[PAD]", seed=4, corpus=PYTHON),
    }


def mean_row(folder: Path, name: str) -> torch.Tensor:
    return tensors_of(folder)[name].mean(dim=0)


def recipe(method: str, inputs: list[Path], source: Path | str, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "models": [{"model": str(path)} for path in inputs],
        "tokenizer": {"source": str(source)},
        "parameters": {"k": 5, **({"weight": 0.5} if method == "omp_linear" else {})},
        "dtype": "float32",
        **more,
    }


def test_a_transplant_warns_and_gives_the_mean(models: dict[str, Path], tmp_path: Path) -> None:
    """Use the tokenizer of a fine-tune that added ``[PAD]`` without a row."""
    log = merge(recipe("omp", [models["plain"]], models["pad"]), tmp_path / "out")
    assert f"{models['plain']} has no row for 1 tokens and neither has a donor" in log
    assert "they get the mean of the kept rows: '[PAD]'" in log
    result, before = tensors_of(tmp_path / "out"), tensors_of(models["plain"])
    for name in (EMBED, HEAD):
        assert torch.equal(result[name][:ROWS], before[name])
        torch.testing.assert_close(result[name][ROWS], mean_row(models["plain"], name))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == ROWS + 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == ROWS


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_merge_with_a_token_without_a_row_in_any_model(
    source: str, models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Check Gemma 3's text models, which have 262,144 rows and a token with that id."""
    inputs = [models["image"], models["plain"]]
    result = run(recipe("omp_linear", inputs, source, base_model=str(inputs[0])), tmp_path / "out", quiet=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<image_soft_token>") == ROWS
    for name in (EMBED, HEAD):
        own = [tensors_of(path)[name] for path in inputs]
        torch.testing.assert_close(result[name][:ROWS], (own[0] + own[1]) / 2)
        torch.testing.assert_close(result[name][ROWS], (own[0].mean(dim=0) + own[1].mean(dim=0)) / 2)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == ROWS + 1
    for path in inputs:
        [log] = [line for line in caplog.messages if line.startswith(f"{path} has no row for 1 tokens")]
        assert log.endswith("'<image_soft_token>'")


def test_with_approximated_tokens(models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that other tokens of the donor are solved for, and that an override replaces the mean."""
    run(recipe("omp", [models["plain"]], models["other"]), tmp_path / "out", quiet=False)
    assert any(line.endswith("the mean of the kept rows: '[PAD]'") for line in caplog.messages)
    assert all(solve["targets"] > 50 for solve in read_record(tmp_path / "out")["solves"])
    tokens = {"[PAD]": {"source": {"kind": "model_token", "model": str(models["plain"]), "token_id": 7}}}
    overridden = {"source": str(models["other"]), "tokens": tokens}
    caplog.clear()
    result = run(
        recipe("omp", [models["plain"]], models["other"], tokenizer=overridden), tmp_path / "over", quiet=False
    )
    assert torch.equal(result[EMBED][-1], tensors_of(models["plain"])[EMBED][7])
    assert not any("neither has a donor" in line for line in caplog.messages)


def test_a_union_omits_tokens_without_a_row_in_another_input(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that, as in mergekit, a union omits tokens beyond the rows of inputs other than the first."""
    run(recipe("omp_linear", [models["plain"], models["image"]], "union"), tmp_path / "out")
    assert "<image_soft_token>" not in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
