"""Test the evaluation on small random models, with a second way to compute every number."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import (
    ModelScore,
    Reading,
    TextScore,
    builtin_texts,
    read_text,
    windows,
)
from mergekit_omp.report.scores import evaluate, format_scores

TEXT = "one two\nthree été two one\nтри two\n" * 3


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with a few merges and a bos token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={piece: id_ for id_, piece in enumerate(pieces)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def small_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_bits_are_the_sum_over_windows_of_the_probability_of_every_token() -> None:
    """Compare with the model's own loss, the mean of natural logarithms over predicted tokens."""
    tokenizer = byte_tokenizer((("o", "n"), ("t", "w")))
    model = small_model(len(tokenizer))
    expected = 0.0
    for window in windows(TEXT, 40):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(window, add_special_tokens=False).input_ids]])
        expected += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
    assert read_text(model, tokenizer, TEXT, window_bytes=40).bits == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    model = small_model(len(tokenizer))
    model.lm_head.weight.data.zero_()
    reading = read_text(model, tokenizer, TEXT)
    assert reading.n_tokens == len(TEXT.encode())
    assert reading.bits / len(TEXT.encode()) == pytest.approx(math.log2(len(tokenizer)), rel=1e-6)


def test_next_bytes_stand_at_the_starts_of_tokens() -> None:
    tokenizer = byte_tokenizer((("o", "n"), ("t", "w")))
    reading = read_text(small_model(len(tokenizer)), tokenizer, "one two", window_bytes=64)
    assert sorted(reading.next_bytes) == [0, 2, 3, 4, 6]


def test_agreement_compares_as_far_as_the_shorter_token_goes() -> None:
    one = Reading(1.0, 3, {0: b"th", 2: b"x", 3: b" a", 9: b"z"})
    other = Reading(1.0, 3, {0: b"the", 2: b"y", 3: b" ", 5: b"z"})
    assert one.agreement(other) == (pytest.approx(2 / 3), 3)
    assert other.agreement(one) == one.agreement(other)


def test_a_token_without_bytes_agrees_with_nothing() -> None:
    assert Reading(1.0, 1, {0: b""}).agreement(Reading(1.0, 1, {0: b"a"})) == (0.0, 1)


def test_agreement_is_unknown_where_tokens_do_not_spell_the_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    reading = read_text(small_model(len(tokenizer)), tokenizer, "A capital")
    assert reading.next_bytes is None
    assert reading.agreement(Reading(1.0, 1, {0: b"a"})) == (None, 0)


@pytest.mark.parametrize("text", ["", "a", "ab cd\nef", "ééééééé", "no line end here", "\n\n\n\n\n\n\n", "  x" * 9])
def test_windows_join_to_the_text_and_are_short(text: str) -> None:
    pieces = windows(text, 7)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= 7 for piece in pieces)


def test_windows_end_at_a_line_end_before_a_space_before_a_character() -> None:
    assert windows("ab\ncd ef", 7) == ["ab\n", "cd ef"]
    assert windows("abcd ef", 6) == ["abcd", " ef"]
    assert windows("ééé", 5) == ["éé", "é"]


def test_windows_too_short_for_a_character() -> None:
    with pytest.raises(OmpError, match="The window is 3 bytes"):
        windows("text", 3)


def test_evaluate_scores_folders_against_the_first(tmp_path: Path) -> None:
    """Check that a model agrees with its copy, and hardly with a model of another seed."""
    tokenizer = byte_tokenizer((("t", "w"),))
    first = save(tmp_path / "first", small_model(len(tokenizer), seed=1), tokenizer)
    copy = save(tmp_path / "copy", small_model(len(tokenizer), seed=1), tokenizer)
    other = save(tmp_path / "other", small_model(len(tokenizer), seed=2), tokenizer)
    texts = {"a": TEXT, "b": "two two\n"}
    scores = evaluate([first, copy, other], texts, progress=False)
    assert [score.overall.agreement for score in scores[:2]] == [1.0, 1.0]
    assert scores[2].overall.agreement < 0.5
    assert scores[0].overall.bits == pytest.approx(scores[1].overall.bits)
    assert scores[0].overall.n_bytes == sum(len(text.encode()) for text in texts.values())
    assert scores[0].texts[1].tokens_per_byte == 6 / 8
    table = format_scores(scores)
    assert table.splitlines()[0].split() == ["first", "copy", "other"]
    first_cells = table.splitlines()[-1].split()[:4]
    overall = scores[0].overall
    assert first_cells == ["overall", f"{overall.bits_per_byte:.3f}", f"{overall.tokens_per_byte:.3f}", "100.0%"]


def test_evaluate_one_model_has_no_agreement(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    folder = save(tmp_path / "model", small_model(len(tokenizer)), tokenizer)
    (score,) = evaluate([folder], {"a": TEXT}, progress=False)
    assert score.overall.agreement is None
    assert score.as_dict()["texts"][0]["bits_per_byte"] == pytest.approx(score.overall.bits_per_byte)


def test_overall_weighs_texts_by_bytes_and_agreement_by_positions() -> None:
    score = ModelScore("m", (TextScore("a", 10, 5, 20.0, 0.5, 4), TextScore("b", 30, 5, 20.0, 1.0, 12)))
    assert score.overall.bits_per_byte == 1.0
    assert score.overall.tokens_per_byte == 0.25
    assert score.overall.agreement == pytest.approx(14 / 16)


def test_ids_without_a_row_are_named() -> None:
    tokenizer = byte_tokenizer((("t", "w"),))
    model = small_model(len(tokenizer) - 1)
    with pytest.raises(OmpError, match=f"emits id {len(tokenizer) - 1}, but the model has {len(tokenizer) - 1} rows"):
        read_text(model, tokenizer, "two")


@pytest.mark.parametrize(
    ("models", "texts", "message"),
    [
        ([], {"a": "b"}, "No model to evaluate"),
        (["m"], {}, "No text to evaluate on"),
        (["m"], {"a": ""}, "The text a is empty"),
        (["no/such/folder"], {"a": "b"}, "MODEL: cannot read a tokenizer from no/such/folder"),
    ],
)
def test_invalid_requests(models: list[str], texts: dict[str, str], message: str) -> None:
    with pytest.raises(OmpError, match=message):
        evaluate(models, texts, progress=False)


@pytest.mark.parametrize("suite", ["tuning", "held_out"])
def test_builtin_texts(suite: str) -> None:
    texts = builtin_texts(suite)
    assert sorted(texts) == ["arithmetic", "code", "languages", "prose"]
    assert all(1000 < len(text.encode()) < 8000 for text in texts.values())


def test_the_suites_share_no_text() -> None:
    assert not set(builtin_texts("tuning").values()) & set(builtin_texts("held_out").values())
    with pytest.raises(OmpError, match="The text suite is 'heldout'"):
        builtin_texts("heldout")
