"""``mergekit-omp restore``: the base's tokenizer again, bit for bit where nothing was trained."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    add_code,
    byte_level_tokenizer,
    make_model,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import merge_here, recipe
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_omp.cli.main import main
from mergekit_omp.output import restore as restore_module
from mergekit_omp.report.record import Origin, pack_rows, read_record, unpack_rows

EMBED = "model.embed_tokens.weight"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, in several shards where it is untied, and its transplant."""
    folder = tmp_path_factory.mktemp("restore")
    tied, tokenizer = request.param == "tied", sentencepiece_tokenizer(ENGLISH)
    base = save(
        folder / "base", make_model(tokenizer, tied=tied, rows=600), tokenizer, shard_size="5GB" if tied else "100KB"
    )
    other = byte_level_tokenizer(PYTHON)
    donor = save(folder / "donor", make_model(other, hidden=24, seed=3), other)
    options = () if tied else ("--out-shard-size", "50000")
    result = merge_here(recipe(base, donor), folder / "out", "--quiet", *options)
    assert result.exit_code == 0, result.output
    return base, folder / "out"


def test_an_untouched_transplant_comes_back_bit_for_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, model = pair
    result = call("restore", model, tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert "rows as they are now" in result.stdout
    before, after = tensors_of(base), tensors_of(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tensors_of(model)[EMBED].shape != before[EMBED].shape
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    original = AutoModelForCausalLM.from_pretrained(base)
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "back"), AutoTokenizer.from_pretrained(base)
    ids = tokenizer(ENGLISH[0], return_tensors="pt").input_ids
    assert ids.tolist() == own(ENGLISH[0], return_tensors="pt").input_ids.tolist()
    assert torch.equal(loaded(ids).logits, original(ids).logits)
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded.config, key) == getattr(original.config, key), key


def test_what_training_did_to_shared_rows_is_carried_over(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every row of the model is turned by one small linear map, which a regression finds."""
    base, model = pair
    trained = shutil.copytree(model, tmp_path / "trained")
    turn = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    for path in trained.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: t @ turn if n == EMBED else t for n, t in tensors.items()}, path, {"format": "pt"})
    result = call("restore", trained, tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert f"{EMBED}: " in result.stdout
    assert "moved as training moved the others" in result.stdout
    before, after = tensors_of(base)[EMBED], tensors_of(tmp_path / "back")[EMBED]
    expected = before @ turn
    record = json.loads((model / "omp_record.json").read_text())
    origins = unpack_rows(next(each for each in record["models"] if "origins" in each)["origins"])
    shared = origins[origins >= 0].unique()
    dropped = torch.tensor(sorted(set(range(len(before))) - set(shared.tolist())))
    assert len(dropped) > 50
    torch.testing.assert_close(after[shared], expected[shared])
    left = (after[dropped] - expected[dropped]).norm() / (before[dropped] - expected[dropped]).norm()
    assert left < 0.1, "nine tenths of the change are carried over"


def test_rows_that_an_override_forces_are_not_the_models_own(tmp_path: Path) -> None:
    tokenizer, other = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(tokenizer), tokenizer)
    donor = save(tmp_path / "donor", make_model(other, seed=3), other)
    forced = {"Ġthe": {"source": {"kind": "model_token", "model": str(base), "token": "▁river"}, "force": True}}
    given = recipe(base, donor, tokenizer={"source": str(donor), "tokens": forced})
    assert merge_here(given, tmp_path / "out", "--quiet").exit_code == 0
    assert call("restore", tmp_path / "out", tmp_path / "back").exit_code == 0
    assert torch.equal(tensors_of(base)[EMBED], tensors_of(tmp_path / "back")[EMBED])


def test_the_record_says_where_each_row_is_from(tmp_path: Path) -> None:
    """Reference: the rows that were written, each of which is the base's that is named, or of one of four kinds."""
    tokenizer, other = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(tokenizer, tied=True), tokenizer)
    donor = save(tmp_path / "donor", make_model(other, seed=3), other)
    zero = {"source": {"kind": "zero"}}
    tokens = {"Ġthe": {**zero, "force": True}, "Ġself": zero, "Ġriver": zero}  # the last has a row in the base
    source = {"source": str(donor), "tokens": tokens, "pad_to_multiple_of": 64}
    assert merge_here(recipe(base, donor, tokenizer=source), tmp_path / "out", "--quiet").exit_code == 0
    record = read_record(tmp_path / "out")
    origins = unpack_rows(record["models"][0]["origins"])
    before, after = tensors_of(base)[EMBED], tensors_of(tmp_path / "out")[EMBED]
    assert len(origins) == len(after) > len(other)
    kept = (origins >= 0).nonzero().flatten()
    assert torch.equal(after[kept], before[origins[kept]])
    assert (origins == Origin.OVERRIDDEN).nonzero().flatten().tolist() == sorted(
        other.convert_tokens_to_ids(["Ġthe", "Ġself"])
    )
    assert not after[origins == Origin.OVERRIDDEN].any()
    assert set((origins == Origin.FREE).nonzero().flatten().tolist()) == set(range(len(other), len(after)))
    assert len(after[origins == Origin.FREE].unique(dim=0)) == 1
    approximated = (origins == Origin.APPROXIMATED).nonzero().flatten().tolist()
    assert set(approximated) | {other.convert_tokens_to_ids("Ġself")} == {
        id_ for id_, _ in record["solves"][0]["tokens"]
    }


def test_what_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, model = pair
    assert "has no omp_record.json" in refused("restore", base, tmp_path / "back")
    donor = model.parent / "donor"
    assert "--base: " in refused("restore", model, tmp_path / "back", "--base", tmp_path / "none")
    assert f"{donor} has another tokenizer than {base}" in refused(
        "restore", model, tmp_path / "back", "--base", donor
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    wider = save(tmp_path / "wider", make_model(tokenizer, hidden=64, rows=600), tokenizer)
    assert "name the model that this one was made from" in refused("restore", model, tmp_path / "b", "--base", wider)
    old = shutil.copytree(model, tmp_path / "old")
    record = json.loads((old / "omp_record.json").read_text())
    for each in record["models"]:
        each.pop("origins", None)
    (old / "omp_record.json").write_text(json.dumps(record))
    assert "does not say where its rows come from" in refused("restore", old, tmp_path / "back")
    assert "is not empty" in refused("restore", model, base)
    assert not (tmp_path / "back").exists()


def test_weights_that_cannot_be_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, model = pair
    out, empty = shutil.copytree(model, tmp_path / "truncated"), shutil.copytree(model, tmp_path / "empty")
    damaged = shutil.copytree(base, tmp_path / "base")
    for folder in (out, damaged):
        for path in folder.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-100])
    for path in [*empty.glob("*.safetensors*")]:
        path.unlink()
    back = tmp_path / "back"
    assert f"MODEL: {out}/model" in refused("restore", out, back)
    assert f"MODEL: {empty} has no weights" in refused("restore", empty, back)
    assert f"--base: the weights of {damaged} cannot be read (" in refused("restore", model, back, "--base", damaged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "empty", "truncated"]


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
)
def test_a_full_disk(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_arguments: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(restore_module, "save_file", fail)
    sentence = refused("restore", pair[1], tmp_path / "back")
    assert f"{tmp_path / 'back'} cannot be written: the disk is full" in sentence
    assert not list(tmp_path.iterdir())


def test_code_that_configurations_name_is_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The model's for its body, and the base's for its tokenizer."""
    base, model = (shutil.copytree(folder, tmp_path / folder.name) for folder in pair)
    code = add_code(model)
    (model / "unused.py").write_text("")
    (base / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    own_name = 'own'\n"
    )
    path, auto_map = base / "tokenizer_config.json", {"AutoTokenizer": [None, "tokenization_own.Tokenizer"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    back = tmp_path / "back"
    result = call("restore", model, back, "--base", base)
    assert result.exit_code == 0, result.output
    assert {path.name for path in back.glob("*.py")} == code | {"tokenization_own.py"}
    assert AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True).own_name == "own"
    assert AutoTokenizer.from_pretrained(back, trust_remote_code=True).own_name == "own"


def test_rows_are_packed_and_unpacked() -> None:
    rows = torch.tensor([5, -1, 0, 2**20])
    assert torch.equal(unpack_rows(pack_rows(rows)), rows)
