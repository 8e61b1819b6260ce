"""Test the ideal bits of `eval --base` against loops over the vocabulary of the base."""

from math import log2
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, save, sentencepiece_tokenizer
from transformers import PreTrainedTokenizerBase

from mergekit_omp.evaluation.bits_per_byte import read_text
from mergekit_omp.evaluation.spans import SpanClass, SpanRuler, token_starts
from mergekit_omp.report.scores import evaluate
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import read_vocabulary

TEXT = "The river and the hills, while 12 foxes print(index) the über-dog.\n" * 2


def splits(base: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> dict[int, tuple[int, ...]]:
    vocabulary = read_vocabulary(base)
    text = [id_ for id_, token in vocabulary.tokens.items() if token.kind.value in ("ordinary", "byte")]
    return dict(zip(text, map(tuple, pieces(vocabulary, other, text)), strict=True))


@pytest.mark.parametrize("other", [byte_level_tokenizer(PYTHON, 300), sentencepiece_tokenizer(PYTHON, 420)])
def test_ideals_are_sums_over_the_vocabulary(other: PreTrainedTokenizerBase) -> None:
    """Compare each piece with a loop over all tokens of the base whose segmentation starts with the same pieces."""
    base = byte_level_tokenizer(ENGLISH, 420)
    own, theirs = read_vocabulary(base), read_vocabulary(other)
    ids = base(TEXT, add_special_tokens=False).input_ids
    logits = torch.randn(len(ids), own.size, generator=torch.Generator().manual_seed(0)) * 3
    probabilities = logits.double().softmax(1).tolist()
    starts = token_starts(ids, TEXT, own)
    bits = [-log2(probabilities[place][id_]) for place, id_ in enumerate(ids)]
    found = SpanRuler(own, other, theirs).measure(TEXT, logits, starts, bits)
    tokens = other(TEXT, add_special_tokens=False).input_ids
    other_starts = token_starts(tokens, TEXT, theirs)
    assert len(found) == len(tokens)

    split_of = splits(base, other)
    counts = {kind: 0 for kind in SpanClass}
    for place, start in enumerate(starts):
        end = starts[place + 1] if place + 1 < len(starts) else len(TEXT.encode())
        inside = [n for n, at in enumerate(other_starts) if start <= at < end]
        if not inside or other_starts[inside[0]] != start or end not in {*other_starts, len(TEXT.encode())}:
            continue  # not a span of one token of the base
        mass = 1.0
        for count, n in enumerate(inside, start=1):
            begin = tuple(tokens[m] for m in inside[:count])
            alike = [id_ for id_, split in split_of.items() if split[:count] == begin]
            if not alike:
                break
            more = sum(probabilities[place][id_] for id_ in alike)
            assert found[n].bits == pytest.approx(-log2(more / mass), abs=1e-4)
            expected = SpanClass.LATER if count > 1 else SpanClass.FIRST if len(inside) > 1 else SpanClass.EQUAL
            assert found[n].kind is expected
            counts[expected] += 1
            mass = more
    assert min(counts[kind] for kind in (SpanClass.EQUAL, SpanClass.FIRST, SpanClass.LATER)) > 0, counts
    assert any(token.kind is SpanClass.CROSSING for token in found)


def test_spans_add_up(tmp_path: Path) -> None:
    """Check that all classes add up to the model's bits, and that crossing spans have the base's bits."""
    base_tokenizer, other = byte_level_tokenizer(ENGLISH, 420), byte_level_tokenizer(PYTHON, 300)
    base = save(tmp_path / "base", make_model(base_tokenizer), base_tokenizer)
    model = save(tmp_path / "model", make_model(other, seed=1), other)
    [score] = evaluate([model], {"text": TEXT}, base=base, progress=False)
    spans = score.overall.spans
    assert sum(span.bits for span in spans.values()) == pytest.approx(score.overall.bits)
    assert sum(span.n_tokens for span in spans.values()) == score.overall.n_tokens
    own = evaluate([base], {"text": TEXT}, progress=False)[0].overall.bits
    ideal = sum(span.ideal_bits for span in spans.values())
    assert ideal <= own + 1e-3, "a prefix has at least the mass of each of its tokens"
    assert score.as_dict()["overall"]["spans"]["equal"]["tokens"] == spans[SpanClass.EQUAL].n_tokens


def test_a_base_with_the_same_tokenizer_has_no_spans(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(ENGLISH, 300)
    base, model = (save(tmp_path / name, make_model(tokenizer, seed=n), tokenizer) for n, name in enumerate("ab"))
    assert evaluate([model], {"text": TEXT}, base=base, progress=False)[0].overall.spans is None
    assert evaluate([base, model], {"text": TEXT}, progress=False)[1].overall.spans is None


def test_rulers_do_not_change_readings() -> None:
    base, other = byte_level_tokenizer(ENGLISH, 420), sentencepiece_tokenizer(ENGLISH, 330)
    model = make_model(base).eval()
    ruler = SpanRuler(read_vocabulary(base), other, read_vocabulary(other))
    plain, measured = read_text(model, base, TEXT), read_text(model, base, TEXT, rulers={"other": ruler})
    assert plain.token_bits == measured.token_bits
    assert len(measured.ideals["other"]) == len(other(TEXT, add_special_tokens=False).input_ids)
