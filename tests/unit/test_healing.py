"""Healing: the teacher's distributions, the gradients of the objectives, texts and options."""

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.chunks import row_chunks
from mergekit_omp.evaluation.spans import SpanRuler
from mergekit_omp.healing.alignment import AlignedWindow, Reader, align
from mergekit_omp.healing.beginnings import sums
from mergekit_omp.healing.generation import Draw
from mergekit_omp.healing.objective import cross_entropy, next_token
from mergekit_omp.healing.options import make_options
from mergekit_omp.healing.teacher import Targets, Teacher
from mergekit_omp.healing.texts import read_texts
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import TokenKind, read_vocabulary

TEXT = "The river and the hills, while 12 foxes print(index) the über-dog.\n" * 2


def reader(tokenizer: PreTrainedTokenizerBase) -> Reader:
    vocabulary = read_vocabulary(tokenizer)
    return Reader(tokenizer, vocabulary, vocabulary.roles["bos"])


def ruler(base: Reader, output: Reader) -> SpanRuler:
    return SpanRuler(base.vocabulary, output.tokenizer, output.vocabulary)


def expected_targets(window: AlignedWindow, probabilities: list[list[float]], base: Reader, output: Reader) -> dict:
    """The distribution at each position that has one, by loops over the base's vocabulary.

    Returns for a position the known probabilities by token and the unknown one.
    """
    text = [id_ for id_, t in base.vocabulary.tokens.items() if t.kind in (TokenKind.ORDINARY, TokenKind.BYTE)]
    split_of = dict(zip(text, map(tuple, pieces(base.vocabulary, output.tokenizer, text)), strict=True))

    def after(row: int, split: tuple[int, ...]) -> tuple[dict[int, float], float]:
        """What follows the pieces of a split: the shares of next pieces, and of the end."""
        alike = {id_: s for id_, s in split_of.items() if s[: len(split)] == split}
        total = sum(probabilities[row][id_] for id_ in alike)
        shares: dict[int, float] = {}
        for id_, full in alike.items():
            if len(full) > len(split):
                next_ = full[len(split)]
                shares[next_] = shares.get(next_, 0.0) + probabilities[row][id_] / total
        return shares, 1 - sum(shares.values())

    found = {}
    previous = None
    for span in window.spans():
        split = tuple(window.output_ids[place] for place in span.output)
        known_split = any(full[: len(split)] == split for full in split_of.values())
        if len(span.base) != 1 or not known_split:
            found |= {place: ({window.output_ids[place]: 1.0}, 0.0) for place in span.output}
            previous = None
            continue
        row = span.base[0]
        first: dict[int, float] = {}
        for id_, full in split_of.items():
            if full:
                first[full[0]] = first.get(full[0], 0.0) + probabilities[row][id_]
        for id_, token in base.vocabulary.tokens.items():
            if token.kind is TokenKind.SPECIAL and (same := role_of(id_, base, output)) is not None:
                first[same] = first.get(same, 0.0) + probabilities[row][id_]
        if previous is not None:
            shares, end = after(*previous)
            first = {id_: end * mass for id_, mass in first.items()}
            for id_, share in shares.items():
                first[id_] = first.get(id_, 0.0) + share
        total = sum(first.values())
        found[span.output[0]] = ({id_: mass / total for id_, mass in first.items()}, 0.0)
        for count, place in enumerate(span.output[1:], 1):
            found[place] = after(row, split[:count])
        previous = (row, split)
    return found


def role_of(id_: int, base: Reader, output: Reader) -> int | None:
    """The output's token of the same role, else of the same text."""
    for role, base_id in base.vocabulary.roles.items():
        if base_id == id_ and role in output.vocabulary.roles and role in ("eos", "bos"):
            return output.vocabulary.roles[role]
    text = base.vocabulary.tokens[id_].text
    return next(
        (i for i, t in output.vocabulary.tokens.items() if t.text == text and t.kind is TokenKind.SPECIAL), None
    )


@pytest.mark.parametrize("output_tokenizer", [byte_level_tokenizer(PYTHON, 300), sentencepiece_tokenizer(PYTHON, 420)])
def test_targets_are_sums_over_the_whole_vocabulary(output_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = byte_level_tokenizer(ENGLISH, 420)
    base, output = reader(tokenizer), reader(output_tokenizer)
    model = make_model(tokenizer, seed=3).eval()
    model.lm_head.weight.data *= 20  # a distribution with likely and unlikely tokens
    rows = output.vocabulary.size + 5
    window = align(TEXT, base, output)
    assert window is not None
    targets = Teacher(model, ruler(base, output), base, output, rows).targets(window)

    with torch.no_grad():
        logits = model(torch.tensor([[base.start_id, *window.base_ids[:-1]]])).logits[0]
    expected = expected_targets(window, logits.double().softmax(1).tolist(), base, output)
    assert targets.known.shape == (len(window.output_ids), rows)
    assert sorted(expected) == list(range(len(window.output_ids)))
    split_positions = 0
    for place, (known, unknown) in expected.items():
        dense = torch.zeros(rows)
        for id_, share in known.items():
            dense[id_] = share
        torch.testing.assert_close(targets.known[place], dense, atol=1e-5, rtol=1e-4)
        assert targets.unknown[place].item() == pytest.approx(unknown, abs=1e-5)
        split_positions += len(known) > 1 and unknown > 0
    assert split_positions > 0
    torch.testing.assert_close(targets.known.sum(1) + targets.unknown, torch.ones(len(expected)))


def test_the_base_teaches_itself_to_stay_as_it_is() -> None:
    """With the same tokenizer the targets are the base's own distribution."""
    tokenizer = byte_level_tokenizer(ENGLISH, 420)
    base = reader(tokenizer)
    model = make_model(tokenizer, seed=3).eval()
    window = align(ENGLISH[0], base, base)
    assert window is not None
    targets = Teacher(model, ruler(base, base), base, base, base.vocabulary.size).targets(window)
    with torch.no_grad():
        logits = model(torch.tensor([[base.start_id, *window.base_ids[:-1]]])).logits[0]
    torch.testing.assert_close(targets.known, logits.softmax(1))
    loss, gradient = cross_entropy(logits, targets)
    assert gradient.abs().max() < 1e-6
    assert loss == pytest.approx(-(logits.softmax(1) * logits.log_softmax(1)).sum().item(), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(2, 12), length=st.integers(1, 6))
def test_gradients_are_those_of_autograd(seed: int, size: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(length, size, generator=generator, dtype=torch.float64).float().requires_grad_()
    ids = torch.randint(size, (length,), generator=generator)
    loss, gradient = next_token(logits.detach(), ids)
    expected = torch.nn.functional.cross_entropy(logits, ids, reduction="sum")
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], atol=1e-5, rtol=1e-4)

    known = torch.rand(length, size, generator=generator) * (torch.rand(length, size, generator=generator) > 0.5)
    known[:, 0] = 0  # something stays unknown
    unknown = torch.rand(length, generator=generator)
    known *= ((1 - unknown) / known.sum(1).clamp_min(1e-9))[:, None]
    unknown = 1 - known.sum(1)
    loss, gradient = cross_entropy(logits.detach(), Targets(known, unknown))
    expected = _coarse_cross_entropy(logits, known, unknown)
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], atol=1e-4, rtol=1e-3)


def _coarse_cross_entropy(logits: Tensor, known: Tensor, unknown: Tensor) -> Tensor:
    probabilities = logits.softmax(1)
    others = torch.where(known > 0, 0.0, probabilities).sum(1)
    return -(known * logits.log_softmax(1)).sum() - (unknown * others.log()).sum()


def test_chunks_cover_every_row_once() -> None:
    array = torch.zeros(1000, 30_000)
    assert [place for rows in row_chunks(array) for place in range(1000)[rows]] == list(range(1000))
    assert len(list(row_chunks(array))) > 1


def test_texts_of_both_kinds_are_read_whole(tmp_path: Path) -> None:
    plain, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    plain.write_text("".join(f"A sentence about {n} foxes.\n" for n in range(400)))
    lines.write_text("".join(json.dumps({"text": f"Document {n}. " * 60}) + "\n" for n in range(20)))
    texts = read_texts([str(plain), str(lines)], seed=1)
    windows = [*texts.training, *texts.held_out]
    assert sum(map(len, windows)) == len(plain.read_text()) + sum(len(f"Document {n}. " * 60) for n in range(20))
    assert len(texts.held_out) == min(12, len(windows) // 10)
    assert not set(texts.held_out) & set(texts.training)
    assert [source["name"] for source in texts.sources] == [str(plain), str(lines)]
    assert read_texts([str(plain), str(lines)], seed=1).training == texts.training
    assert read_texts([str(plain), str(lines)], seed=2).training != texts.training


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("short.txt", b"too short", "text: 9 bytes are too few to train on: name texts with at least 3,072."),
        ("latin.txt", "ü".encode("latin-1") * 9000, "is not UTF-8 (byte 0); convert it"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2: invalid JSON"),
        ("other.jsonl", b'{"content": "a"}\n', 'line 1: no "text"'),
    ],
)
def test_texts_that_do_not_serve(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OmpError) as refusal:
        read_texts([str(tmp_path / name)], seed=0)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"minuts": 3}, "minuts: no such key (did you mean minutes?)"),
        ({"minutes": 0}, "minutes: 0 is not possible here"),
        ({"minutes": 3, "tokens": 5}, "minutes: 3 and tokens: 5: write one of them."),
        ({"objective": "mse"}, "objective: 'mse' is not possible here"),
        ({"text": ["a"], "generate": True}, "text and generate: true exclude each other"),
        ({"generate": False}, "generate: false, but no text"),
        ({"rank": "16"}, "rank: '16' is not possible here"),
    ],
)
def test_options_that_do_not_serve(values: dict, sentence: str) -> None:
    with pytest.raises(OmpError) as refusal:
        make_options({"model": "a", "out": "b"} | values, "heal.yml")
    assert str(refusal.value).startswith("heal.yml: ")
    assert sentence in str(refusal.value)


def test_learning_rates() -> None:
    options = make_options({"model": "a", "out": "b", "train": "full", "text": "one.txt"}, "x")
    assert options.text == ("one.txt",)
    assert options.learning_rate < make_options({"model": "a", "out": "b"}, "x").learning_rate
    assert make_options({"model": "a", "out": "b", "lr": 0.5}, "x").learning_rate == 0.5
    assert make_options({"model": "a", "out": "b"}, "x").seconds == 600
    assert make_options({"model": "a", "out": "b", "tokens": 7}, "x").seconds is None


def test_perplexity_of_the_teacher_is_finite() -> None:
    """A window whose tokens the base finds nearly impossible has finite targets."""
    tokenizer = byte_level_tokenizer(ENGLISH, 420)
    base, output = reader(tokenizer), reader(byte_level_tokenizer(PYTHON, 300))
    model = make_model(tokenizer, seed=3).eval()
    model.lm_head.weight.data *= 1e4
    window = align(TEXT, base, output)
    assert window is not None
    targets = Teacher(model, ruler(base, output), base, output, output.vocabulary.size).targets(window)
    assert targets.known.isfinite().all()
    assert targets.unknown.isfinite().all()


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50).masked_fill(torch.arange(50) % 3 == 0, -torch.inf)
    n = 40_000
    scores = Draw()(torch.zeros(n, 1, dtype=torch.int64), logits.repeat(n, 1))
    assert ((scores == 0).sum(dim=1) == 1).all()
    assert (scores[scores != 0] == -torch.inf).all()
    counts, expected = (scores == 0).sum(dim=0), logits.softmax(dim=0) * n
    assert (counts[expected == 0] == 0).all()
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_sums_are_right() -> None:
    lines = [line for text in sums(seed=3) for line in text.splitlines()]
    assert {line.split()[1] for line in lines} == {"+", "-", "*"}
    for line in lines:
        one, sign, other, _, result = line.split()
        assert {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(one), int(other)) == int(result)
    assert sums(seed=3) == sums(seed=3) != sums(seed=4)
