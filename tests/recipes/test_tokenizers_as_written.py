"""Test that tokenizers are read as their files declare, whatever class transformers chooses."""

import json
import logging
from pathlib import Path
from typing import Any

import helpers.tokenizers_for_tests as tt
import pytest
import torch
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    run,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import recipe
from helpers.versions import TRANSFORMERS, since
from mergekit.common import ModelReference
from packaging.version import Version
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.mistral import convert_tekken_tokenizer

from mergekit_omp.checkpoints import tokenizers as tokenizers_module
from mergekit_omp.checkpoints.tokenizers import is_read_as_written, load_tokenizer
from mergekit_omp.errors import OmpError
from mergekit_omp.report.record import read_record
from mergekit_omp.vocabulary.tokens import TokenKind, read_vocabulary

EMBED = "model.embed_tokens.weight"
TEXTS = ["The quick brown fox", "  two spaces, 12 numbers", "def add(a):\n\treturn a", "Größe, здравствуй 🙂"]


def read(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelReference.model_validate(str(folder)), trust_remote_code=False, key="models[0].model")


def twins(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> tuple[Path, Path]:
    """Write one tokenizer and one pair of matrices twice: as a qwen2, whose tokenizer is rebuilt, and as a llama."""
    qwen2, llama = (make_model(tokenizer, architecture=name, seed=seed) for name in ("qwen2", "llama"))
    llama.get_input_embeddings().weight.data.copy_(qwen2.get_input_embeddings().weight)
    llama.get_output_embeddings().weight.data.copy_(qwen2.get_output_embeddings().weight)
    return save(folder / "qwen2", qwen2, tokenizer), save(folder / "llama", llama, tokenizer)


@pytest.mark.parametrize(
    "written_class",
    ["Qwen2Tokenizer", pytest.param("TokenizersBackend", marks=since("5.8", "rebuilding whatever class is named"))],
)
@pytest.mark.parametrize(
    "build",
    [lambda: sentencepiece_tokenizer(ENGLISH, size=520), tt.unigram, tt.word_piece],
    ids=["replaced spaces", "metaspace", "wordpiece"],
)
def test_a_qwen2_with_another_familys_tokenizer(
    build: Any, written_class: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = build()
    folder, _ = twins(tmp_path, tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": written_class}))
    rebuilt = AutoTokenizer.from_pretrained(folder)
    assert not is_read_as_written(rebuilt, folder / "tokenizer.json")
    with caplog.at_level(logging.INFO):
        loaded = read(folder)
    assert f"{folder}: transformers loads its tokenizer as a Qwen2Tokenizer" in caplog.text
    assert read_vocabulary(loaded) == read_vocabulary(tokenizer)
    assert read_vocabulary(loaded) != read_vocabulary(rebuilt)
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_tokenizers_read_as_written_are_unchanged(
    smollm2_dir: Path, gemma3_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        # transformers 5.1 and 5.2 leave Gemma's pre-tokenizer out.
        for folder in (smollm2_dir, gemma3_dir) if Version("5.3") <= TRANSFORMERS else (smollm2_dir,):
            read_as = type(AutoTokenizer.from_pretrained(folder))
            assert type(read(folder)) is read_as
    assert "tokenizer.json is used instead" not in caplog.text


@pytest.mark.parametrize("side", ["base", "donor", "inputs"])
def test_recipes_are_the_same_for_both_bodies(side: str, tmp_path: Path) -> None:
    """Compare recipes with bases, donors and inputs of type qwen2 with those of a llama."""
    metaspace, byte_level = sentencepiece_tokenizer(ENGLISH, size=520), byte_level_tokenizer(PYTHON, size=400)
    ours, others = twins(tmp_path / "ours", metaspace), twins(tmp_path / "other", byte_level, seed=5)
    results, anchors = [], []
    for own, other in zip(ours, others, strict=True):
        if side == "inputs":
            made = recipe(own, "base", merge_method="omp_linear", base_model=str(own))
            made["models"].append({"model": str(other)})
            made["parameters"]["weight"] = 0.5
        else:
            made = recipe(own, other) if side == "base" else recipe(other, own)
        out = tmp_path / f"out of {own.name}"
        results.append(run(made, out))
        anchors.append([model["anchors"] for model in read_record(out)["models"] if "input" in model["roles"]])
        source = byte_level if side == "base" else metaspace
        assert read_vocabulary(read(out)).tokens == read_vocabulary(source).tokens
    assert anchors[0] == anchors[1]
    for name in (EMBED, "lm_head.weight"):
        assert torch.equal(results[0][name], results[1][name]), name


# Byte tokens


def test_byte_tokens_that_are_flagged_special_are_bytes(tmp_path: Path) -> None:
    """Check Llama 2 conversions that list ``<0x00>`` to ``<0xFF>`` as special added tokens."""
    plain = sentencepiece_tokenizer(ENGLISH, size=520)
    described = json.loads(plain.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    described["added_tokens"] += [{"id": vocabulary[text], "content": text, **flags} for text in fallback]
    flagged = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        **{role: getattr(plain, role) for role in ("pad_token", "eos_token", "bos_token", "unk_token")},
    )
    assert flagged.added_tokens_decoder[vocabulary["<0x0A>"]].special
    read_as = read_vocabulary(flagged)
    for byte, text in enumerate(fallback):
        token = read_as.tokens[vocabulary[text]]
        assert (token.kind, token.data) == (TokenKind.BYTE, bytes([byte]))
    assert {t.kind for t in read_as.tokens.values() if t.text in plain.all_special_tokens} == {TokenKind.SPECIAL}

    base = save(tmp_path / "base", make_model(flagged), flagged)
    same = save(tmp_path / "same", make_model(plain), plain)
    donor_tokenizer = byte_level_tokenizer(PYTHON, size=400)
    donor = save(tmp_path / "donor", make_model(donor_tokenizer, hidden=24, seed=3), donor_tokenizer)
    result, expected = (run(recipe(model, donor), tmp_path / f"out of {model.name}") for model in (base, same))
    before = tensors_of(base)[EMBED]
    newline = donor_tokenizer.convert_tokens_to_ids("Ċ")
    assert torch.equal(result[EMBED][newline], before[vocabulary["<0x0A>"]])
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


# Tekken

READS_TEKKEN = since("5.17", "reading a tekken.json with its special tokens")


@pytest.fixture(scope="module")
def small_tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write Mistral's Tekken file with its first 700 tokens, which are a valid tokenizer."""
    described = json.loads(tt.package_file("mistral_common", "data/tekken_240911.json").read_text())
    described["vocab"] = described["vocab"][:700]
    described["config"]["default_vocab_size"] = described["config"]["default_num_special_tokens"] + 700
    folder = tmp_path_factory.mktemp("tekken")
    (folder / "tekken.json").write_text(json.dumps(described))
    return folder


@READS_TEKKEN
def test_tekken_alone_is_the_whole_tokenizer(tmp_path: Path) -> None:
    """The file of Mistral NeMo: the same ids and texts as its conversion, with the roles and bos of mistral-common."""
    source = tt.package_file("mistral_common", "data/tekken_240911.json")
    (tmp_path / "tekken.json").write_bytes(source.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    by_mistral = AutoTokenizer.from_pretrained(tmp_path)
    assert type(by_mistral).__name__ == "MistralCommonBackend", "which declares nothing of how it writes bytes"
    tokenizer = read(tmp_path)
    tokens = read_vocabulary(tokenizer).tokens
    expected = read_vocabulary(tt.tekken()).tokens
    assert len(tokens) == 131_072
    assert {id_: token.data for id_, token in tokens.items()} == {id_: token.data for id_, token in expected.items()}
    for text in TEXTS:
        assert tokenizer(text).input_ids == by_mistral(text).input_ids
    assert read_vocabulary(tokenizer).roles == {"bos": 1, "eos": 2, "unk": 0, "pad": 11}


def test_tekken_without_tokenizer_json_and_an_old_transformers(
    small_tekken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers_module.transformers, "__version__", "5.13.0")
    with pytest.raises(OmpError, match=r"needs transformers 5.17 or newer, and 5.13.0 is installed\); name a model"):
        read(small_tekken)


@READS_TEKKEN
@pytest.mark.parametrize("with_weights", [True, False])
def test_a_tekken_donor(with_weights: bool, small_tekken: Path, tmp_path: Path) -> None:
    """Compare a donor with tekken.json, with or without a model, with the same donor with tokenizer.json."""
    converted = convert_tekken_tokenizer(str(small_tekken / "tekken.json"))
    donor, twin = tmp_path / "donor", tmp_path / "twin"
    for folder in (donor, twin):
        if with_weights:
            make_model(converted, architecture="mistral", hidden=24, seed=3).save_pretrained(folder)
        folder.mkdir(exist_ok=True)
    (donor / "tekken.json").write_bytes((small_tekken / "tekken.json").read_bytes())
    converted.save_pretrained(twin)
    tokenizer = byte_level_tokenizer(ENGLISH, size=400)
    base = save(tmp_path / "base", make_model(tokenizer), tokenizer)
    more = {} if with_weights else {"parameters": {"approximation": "subword"}}
    result, expected = (
        run(recipe(base, source, **more), tmp_path / f"out of {source.name}") for source in (donor, twin)
    )
    assert len(result[EMBED]) == 1700
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    written = AutoTokenizer.from_pretrained(tmp_path / "out of donor")
    for text in TEXTS:
        assert written(text).input_ids == [1, *converted(text, add_special_tokens=False).input_ids]
    kept = tokenizer.convert_tokens_to_ids("Ġthe")
    assert torch.equal(result[EMBED][converted.convert_tokens_to_ids("Ġthe")], tensors_of(base)[EMBED][kept])


def test_tokenizer_json_takes_precedence_over_tekken(small_tekken: Path, tmp_path: Path) -> None:
    """Check Mistral's own folders, for which transformers prefers mistral-common's class."""
    converted = convert_tekken_tokenizer(str(small_tekken / "tekken.json"))
    converted.save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_bytes((small_tekken / "tekken.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    assert read_vocabulary(read(tmp_path)) == read_vocabulary(converted)
