"""Test the main use on real weights: Gemma-3-270M gets SmolLM2's tokenizer."""

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import merge, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_omp.evaluation.bits_per_byte import builtin_texts, read_text, score_readings
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.tokens import read_vocabulary

EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def transplanted(gemma3_dir: Path, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "out"
    recipe = {
        "merge_method": "omp",
        "models": [{"model": str(gemma3_dir)}],
        "tokenizer": {"source": str(smollm2_dir)},
        "parameters": {"k": 64},
        "dtype": "bfloat16",
    }
    merge(recipe, out)
    return out


@pytest.mark.slow
def test_anchors_and_body_are_gemmas(transplanted: Path, gemma3_dir: Path) -> None:
    """Compare the rows of anchors, and tensors without a vocabulary axis, bit for bit."""
    before, after = tensors_of(gemma3_dir), tensors_of(transplanted)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before if name != EMBED)
    match = match_vocabularies(
        *(read_vocabulary(AutoTokenizer.from_pretrained(f)) for f in (transplanted, gemma3_dir))
    )
    kept = (match.rows >= 0).nonzero().squeeze(1)
    assert len(kept) > 46_000
    assert torch.equal(after[EMBED][kept], before[EMBED][match.rows[kept]])


@pytest.mark.slow
def test_better_than_zero_and_mean(transplanted: Path, gemma3_dir: Path) -> None:
    """Compare bits per byte with new rows that are zero or Gemma's mean, and generate text."""
    tokenizer, model = AutoTokenizer.from_pretrained(transplanted), AutoModelForCausalLM.from_pretrained(transplanted)
    model = model.float()
    original = read_vocabulary(AutoTokenizer.from_pretrained(gemma3_dir))
    new = match_vocabularies(read_vocabulary(tokenizer), original).is_new().nonzero().squeeze(1)
    assert 2_900 < len(new) < 3_100
    embedding = model.get_input_embeddings().weight.data
    rows = {
        "omp": embedding[new].clone(),
        "mean": tensors_of(gemma3_dir)[EMBED].float().mean(dim=0).expand(len(new), -1),
        "zero": torch.zeros(len(new), embedding.shape[1]),
    }
    texts = {name: text[:800] for name, text in builtin_texts("tuning").items()}
    bits = {}
    for name, values in rows.items():
        embedding[new] = values
        readings = {title: read_text(model, tokenizer, text) for title, text in texts.items()}
        bits[name] = score_readings(name, texts, readings, None).overall.bits_per_byte
    assert bits["omp"] < bits["mean"]
    assert bits["omp"] < bits["zero"]
    embedding[new] = rows["omp"]
    # Gemma reads nothing well without a bos, and SmolLM2's tokenizer adds none.
    prompt = tokenizer(tokenizer.bos_token + "The opposite of hot is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "cold" in answer
