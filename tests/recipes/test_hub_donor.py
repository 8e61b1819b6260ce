"""A donor on the Hub: only the shards that hold its vocabulary are fetched."""

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    merge,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)


def test_other_shards_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, with a Hub cache that lacks every shard but those of the embedding and the head."""
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(base_tokenizer), base_tokenizer)
    donor_model = make_model(donor_tokenizer, architecture="mistral", hidden=24, seed=2)
    donor = save(tmp_path / "donor", donor_model, donor_tokenizer, shard_size="20KB")
    recipe = {
        "merge_method": "omp",
        "models": [{"model": str(base)}],
        "tokenizer": {"source": str(donor)},
        "dtype": "float32",
    }
    merge(recipe, tmp_path / "expected")

    repository = tmp_path / "hub" / "models--some--donor"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    donor.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    weight_map = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {weight_map["model.embed_tokens.weight"], weight_map["lm_head.weight"]}
    others = [path for path in snapshot.glob("*.safetensors") if path.name not in needed]
    assert len(others) > 2
    for path in others:
        path.unlink()

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    merge({**recipe, "tokenizer": {"source": "some/donor"}}, tmp_path / "out")
    expected, result = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "out")
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
