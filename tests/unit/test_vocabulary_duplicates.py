"""Test that among output tokens with one row, the token that the tokenizer writes keeps it."""

from pathlib import Path

from helpers.checkpoints import ENGLISH, byte_level_tokenizer, sentencepiece_tokenizer
from transformers import AutoTokenizer

from mergekit_omp.vocabulary.duplicates import without_duplicates
from mergekit_omp.vocabulary.matching import MatchReason, match_vocabularies
from mergekit_omp.vocabulary.tokens import read_vocabulary


def test_gemma_keeps_its_digits(gemma3_dir: Path, smollm2_dir: Path) -> None:
    """Check that Gemma's ``5`` gets SmolLM2's row and ``<0x35>`` does not; digits and newlines keep their rows."""
    gemma, smollm2 = (AutoTokenizer.from_pretrained(path) for path in (gemma3_dir, smollm2_dir))
    output, model = read_vocabulary(gemma), read_vocabulary(smollm2)
    found = match_vocabularies(output, model)
    match = without_duplicates(found, output, gemma)
    silent = {output.tokens[id_].text for id_ in (match.rows != found.rows).nonzero().flatten().tolist()}
    assert {f"<0x{ord(digit):02X}>" for digit in "0123456789"} <= silent
    assert len(silent) > 100
    assert all(text.startswith("<0x") for text in silent)
    for text in "0123456789\n .":
        [id_] = gemma(text, add_special_tokens=False)["input_ids"]
        assert match.rows[id_] == smollm2(text, add_special_tokens=False)["input_ids"][0]
    kept = match.rows[match.is_text()].tolist()
    assert len(kept) == len(set(kept))


def test_nothing_changes_where_the_model_has_both(gemma3_dir: Path) -> None:
    gemma = AutoTokenizer.from_pretrained(gemma3_dir)
    vocabulary = read_vocabulary(gemma)
    match = match_vocabularies(vocabulary, vocabulary)
    assert (without_duplicates(match, vocabulary, gemma).rows == match.rows).all()


def test_counted_as_duplicates() -> None:
    output, model = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(ENGLISH)
    vocabulary = read_vocabulary(output)
    found = match_vocabularies(vocabulary, read_vocabulary(model))
    match = without_duplicates(found, vocabulary, output)
    lost = (match.rows != found.rows).sum()
    assert match.counts()[MatchReason.DUPLICATE] == lost > 20
