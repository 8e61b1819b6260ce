"""Test `approximation: zett`: a hypernetwork predicts rows from the bytes of each token."""

import itertools
import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    cut_rows,
    make_model,
    run,
    save,
    sentencepiece_tokenizer,
)
from helpers.commands import recipe, refusal
from helpers.new_tokens_for_tests import new_tokens
from helpers.tiny_hypernetwork import TinyHypernetwork, save_hypernetwork
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers import zett as module_under_test
from mergekit_omp.initializers.base import NewTokens
from mergekit_omp.initializers.zett import check_zett, zett
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.vocabulary.byte_encoding import BYTE_ALPHABET
from mergekit_omp.vocabulary.tokens import TokenKind

WIDTH, ROWS, PAD = 12, 430, "<|pad|>"
CHARACTER_OF = {byte: character for character, byte in BYTE_ALPHABET.items()}

Rows = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer(ENGLISH, size=420, special=(PAD,))
    tokenizer.pad_token = PAD
    return tokenizer


@pytest.fixture(scope="module")
def matrices() -> Rows:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(ROWS, WIDTH, generator=generator).bfloat16() for _ in range(2))


@pytest.fixture
def make_new_tokens(tokenizer: PreTrainedTokenizerFast, matrices: Rows, tmp_path: Path) -> partial[NewTokens]:
    """Build the new tokens of a SentencePiece tokenizer for the hypernetwork in the test's folder."""
    parameters = {"approximation": "zett", "hypernetwork": str(tmp_path)}
    output = sentencepiece_tokenizer(PYTHON, size=520)
    return partial(new_tokens, tokenizer, output, parameters, embedding_and_head=matrices, trust_remote_code=True)


def spelled(data: bytes, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Apply byte-pair encoding by its definition: join the pair that was learnt first until none is left."""
    merges = [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    pieces = [CHARACTER_OF[byte] for byte in data]
    while pairs := [pair for pair in itertools.pairwise(pieces) if pair in merges]:
        first = min(pairs, key=merges.index)
        at = next(i for i in range(len(pieces)) if tuple(pieces[i : i + 2]) == first)
        pieces[at : at + 2] = ["".join(first)]
    return [tokenizer.get_vocab()[piece] for piece in pieces]


def expected_rows(
    hypernetwork: TinyHypernetwork,
    tokenizer: PreTrainedTokenizerFast,
    matrices: Rows,
    new: NewTokens,
    longest: int = 3,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run the module for one token at a time."""
    source = torch.cat([matrix.float() for matrix in matrices], dim=1)
    of_input, of_head = [], []
    for id_ in new.problem.target_ids.tolist():
        form = (spelled(new.output.tokens[id_].data, tokenizer) + [tokenizer.pad_token_id] * longest)[:longest]
        with torch.no_grad():
            first, second, _ = hypernetwork(torch.tensor([form]), source_embeddings=source)
        of_input.append(first[0])
        of_head.append(second[0])
    return of_input, of_head


@pytest.mark.parametrize("batch", [1024, 7])
def test_rows_are_what_the_hypernetwork_predicts_for_the_bytes(
    tokenizer: PreTrainedTokenizerFast,
    matrices: Rows,
    make_new_tokens: partial[NewTokens],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    monkeypatch.setattr(module_under_test, "TARGETS_PER_BATCH", batch)
    hypernetwork = save_hypernetwork(tmp_path, tokenizer)
    new = make_new_tokens()
    lengths = {len(spelled(new.output.tokens[id_].data, tokenizer)) for id_ in new.problem.target_ids.tolist()}
    assert {2, 3, 4} <= lengths, "some are padded, and some are cut off"
    of_input, of_head = expected_rows(hypernetwork, tokenizer, matrices, new)
    make = zett(new)
    made = make(matrices[0], False), make(matrices[1], True)
    for rows, expected in zip(made, (of_input, of_head), strict=True):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert (made[0] - made[1]).abs().max() > 0.1


def test_ids_beyond_the_models_are_the_hypernetworks_own(
    tokenizer: PreTrainedTokenizerFast, matrices: Rows, make_new_tokens: partial[NewTokens], tmp_path: Path
) -> None:
    """Check ids for bytes that the authors' tool adds to a vocabulary without them."""
    hypernetwork = save_hypernetwork(tmp_path, tokenizer, original_vocab_size=len(tokenizer) - 3)
    made = zett(make_new_tokens())(matrices[0], False)
    expected = expected_rows(hypernetwork, tokenizer, matrices, make_new_tokens())[0]
    torch.testing.assert_close(made, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_special_token_of_the_hypernetwork_is_one_piece(
    tokenizer: PreTrainedTokenizerFast, matrices: Rows, tmp_path: Path
) -> None:
    hypernetwork = save_hypernetwork(tmp_path, tokenizer)
    output = byte_level_tokenizer(PYTHON, size=300, special=("<|other|>",))
    new = new_tokens(
        tokenizer,
        output,
        {"approximation": "zett", "hypernetwork": str(tmp_path)},
        approximate=["<|endoftext|>"],
        embedding_and_head=matrices,
        trust_remote_code=True,
    )
    ids, made = new.problem.target_ids.tolist(), zett(new)(matrices[0], False)
    forms = {
        "<|endoftext|>": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id],
        "<|other|>": spelled(b"<|other|>", tokenizer)[:3],
    }
    for text, form in forms.items():
        id_ = output.convert_tokens_to_ids(text)
        assert new.output.tokens[id_].kind is TokenKind.SPECIAL
        source = torch.cat([matrix.float() for matrix in matrices], dim=1)
        with torch.no_grad():
            expected = hypernetwork(torch.tensor([form]), source_embeddings=source)[0][0]
        torch.testing.assert_close(made[ids.index(id_)], expected, atol=1e-5, rtol=1e-5)


def test_a_token_without_bytes_gets_the_mean_of_the_anchors(
    tokenizer: PreTrainedTokenizerFast,
    matrices: Rows,
    make_new_tokens: partial[NewTokens],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_hypernetwork(tmp_path, tokenizer)
    new = make_new_tokens()
    id_ = new.problem.target_ids[0].item()
    tokens = {**new.output.tokens, id_: new.output.tokens[id_]._replace(data=b"")}
    caplog.set_level(logging.INFO)
    rows = zett(replace(new, output=replace(new.output, tokens=tokens)))(matrices[1], True)
    torch.testing.assert_close(rows[0], matrices[1][new.anchor_rows].float().mean(dim=0))
    assert bool(rows.isfinite().all())
    assert "1 have no bytes" in caplog.text


def test_a_tied_hypernetwork_reads_and_predicts_one_matrix(
    tokenizer: PreTrainedTokenizerFast, matrices: Rows, make_new_tokens: partial[NewTokens], tmp_path: Path
) -> None:
    hypernetwork = save_hypernetwork(tmp_path, tokenizer, separate_out_embeddings=False)
    new = make_new_tokens(embedding_and_head=(matrices[0], matrices[0].clone()))
    form = (spelled(new.output.tokens[new.problem.target_ids[0].item()].data, tokenizer) + [1] * 3)[:3]
    assert tokenizer.pad_token_id == 1
    with torch.no_grad():
        expected = hypernetwork(torch.tensor([form]), source_embeddings=matrices[0].float())[0][0]
    make = zett(new)
    torch.testing.assert_close(make(matrices[0], False)[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(make(matrices[0], False), make(matrices[0], True))


def refused(new: NewTokens) -> str:
    with pytest.raises(OmpError) as caught:
        zett(new)
    sentence = str(caught.value)
    assert sentence.startswith("parameters.hypernetwork: ")
    assert "\n" not in sentence
    return sentence


def test_code_is_not_run_without_permission(
    tokenizer: PreTrainedTokenizerFast, make_new_tokens: partial[NewTokens], tmp_path: Path
) -> None:
    save_hypernetwork(tmp_path, tokenizer)
    (tmp_path / "tiny_hypernetwork.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    sentence = refused(make_new_tokens(trust_remote_code=False))
    assert "pass --trust-remote-code to mergekit-yaml" in sentence
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_embd": 16}, "is for rows of width 16, but the model's have width 12"),
        ({"original_vocab_size": 5000}, "is for another vocabulary, of 5000 tokens"),
        ({"separate_out_embeddings": False}, "predicts no rows for an LM head, but the model has a separate one"),
        ({"hn_embed_lang_id": True}, "is multilingual and requires a language id"),
        ({"auto_map": {}}, "is not a hypernetwork of ZeTT"),
    ],
)
def test_a_hypernetwork_that_does_not_fit_is_refused(
    tokenizer: PreTrainedTokenizerFast,
    make_new_tokens: partial[NewTokens],
    tmp_path: Path,
    config: dict[str, Any],
    expected: str,
) -> None:
    save_hypernetwork(tmp_path, tokenizer)
    declared = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(declared | config))
    assert expected in refused(make_new_tokens())


def test_the_hypernetwork_of_another_vocabulary_is_refused(
    make_new_tokens: partial[NewTokens], tmp_path: Path
) -> None:
    other = byte_level_tokenizer(PYTHON, size=420, special=(PAD, "<|shifts all ids by one|>"))
    other.pad_token = PAD
    save_hypernetwork(tmp_path, other)
    assert "of which 0 have the same id in the model" in refused(make_new_tokens())


def test_a_model_is_not_a_hypernetwork(
    tokenizer: PreTrainedTokenizerFast, make_new_tokens: partial[NewTokens], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    assert "is not a hypernetwork of ZeTT" in refused(make_new_tokens())


@pytest.mark.parametrize(
    "broken", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "tiny_hypernetwork.py"]
)
def test_a_checkpoint_that_cannot_be_loaded_is_refused(
    tokenizer: PreTrainedTokenizerFast, make_new_tokens: partial[NewTokens], tmp_path: Path, broken: str
) -> None:
    save_hypernetwork(tmp_path, tokenizer)
    (tmp_path / broken).write_text("{ broken")
    assert "cannot be loaded" in refused(make_new_tokens())


@pytest.mark.parametrize("named", ["/no/such/folder", "./relative", "a/b/c"])
def test_a_missing_folder_is_refused_early(named: str) -> None:
    with pytest.raises(OmpError, match=r"^parameters.hypernetwork: .* is not a folder"):
        check_zett(OmpParameters(hypernetwork=named), "parameters")


def test_a_folder_without_a_checkpoint_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(OmpError, match=r"^parameters.hypernetwork: the folder .* has no config.json"):
        check_zett(OmpParameters(hypernetwork=str(tmp_path)), "parameters")


def test_a_recipe_must_name_one() -> None:
    with pytest.raises(OmpError, match=r"^parameters: approximation: zett needs .* add hypernetwork: and a folder"):
        check_zett(OmpParameters(), "parameters")


def test_a_name_on_the_hub_and_a_checkpoint_pass(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_hypernetwork(tmp_path, tokenizer)
    for named in ("benjamin/zett-hypernetwork-Mistral-7B-v0.1", str(tmp_path)):
        check_zett(OmpParameters(hypernetwork=named), "parameters")


@pytest.mark.parametrize("tied", [False, True])
def test_a_recipe_makes_the_rows_of_both_matrices(
    tokenizer: PreTrainedTokenizerFast, make_new_tokens: partial[NewTokens], tmp_path: Path, tied: bool
) -> None:
    """Check a tokenizer without a model as the source."""
    save_hypernetwork(tmp_path, tokenizer, n_embd=32, separate_out_embeddings=not tied)
    model = make_model(tokenizer, tied=tied)
    base, other = save(tmp_path / "base", model, tokenizer), tmp_path / "other"
    matrices = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    new = make_new_tokens(embedding_and_head=matrices)
    new.output_tokenizer.save_pretrained(other)
    asked = recipe(base, other, parameters={"approximation": "zett", "hypernetwork": str(tmp_path)})
    assert "pass --trust-remote-code" in refusal(asked, tmp_path / "refused")
    made = run(asked, tmp_path / "out", trust_remote_code=True)
    make, ids = zett(new), new.problem.target_ids
    torch.testing.assert_close(made["model.embed_tokens.weight"][ids], make(matrices[0], False))
    assert ("lm_head.weight" in made) != tied
    if not tied:
        torch.testing.assert_close(made["lm_head.weight"][ids], make(matrices[1], True))


def test_a_base_with_too_few_rows_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Rows are counted before the hypernetwork is compared with them, which would blame the hypernetwork."""
    save_hypernetwork(tmp_path, tokenizer, n_embd=32)
    base, other = save(tmp_path / "base", make_model(tokenizer), tokenizer), tmp_path / "other"
    cut_rows(base)
    sentencepiece_tokenizer(PYTHON, size=520).save_pretrained(other)
    asked = recipe(base, other, parameters={"approximation": "zett", "hypernetwork": str(tmp_path)})
    sentence = refusal(asked, tmp_path / "out", "--trust-remote-code")
    assert "model.embed_tokens.weight" in sentence
    assert f"of {base} has 100 rows, but its config.json promises at least" in sentence
