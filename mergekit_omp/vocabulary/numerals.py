"""Classify how tokenizers split numbers: models differ in arithmetic when numbers are tokenised differently.

Goddard & Fernandes Neto (2025, arXiv:2506.06607) identify mismatched numeral schemes as the cause of lost mathematical
ability after a transplant.
"""

import random
from collections.abc import Sequence
from enum import Enum

from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.segmentation import text_encoder
from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary

_CHUNK = 3
_MAX_WHOLE_DIGITS = 4


class NumeralScheme(str, Enum):
    """How a tokenizer splits a number of several digits."""

    SINGLE_DIGITS = "single digits"
    CHUNKS_FROM_LEFT = "chunks of up to three digits from the left"  # 1234567 -> 123 456 7
    CHUNKS_FROM_RIGHT = "chunks of up to three digits from the right"  # 1234567 -> 1 234 567
    WHOLE = "whole numbers"  # of up to four digits
    MIXED = "chunks of varying length"  # determined by the merges, as in GPT-2


def numeral_scheme(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> NumeralScheme:
    """Determine how a tokenizer splits numbers from its tokens for numbers of two to eight digits.

    Args:
        tokenizer: tokenizer to examine.
        vocabulary: its vocabulary.
    """
    numbers = _probes()
    encoded = list(_encode(tokenizer, vocabulary, numbers))
    if any(id_ not in vocabulary.tokens for ids in encoded for id_ in ids):
        vocabulary = read_vocabulary(tokenizer)  # the given vocabulary may be truncated to the rows of a model
    splits = [
        (len(number), tuple(filter(None, (len(vocabulary.tokens[id_].data.strip()) for id_ in ids))))
        for number, ids in zip(numbers, encoded, strict=True)
    ]
    for scheme, expected in _EXPECTED.items():
        if all(split == expected(length) for length, split in splits):
            return scheme
    if all(split == (length,) for length, split in splits if length <= _MAX_WHOLE_DIGITS):
        return NumeralScheme.WHOLE
    return NumeralScheme.MIXED


def numeral_warning(output: NumeralScheme, model: NumeralScheme) -> str | None:
    """Return a warning if the output tokenizer and the model split numbers differently, else None."""
    if output is model and output is not NumeralScheme.MIXED:
        return None
    return (
        f"The output tokenizer writes numbers as {output.value} and the model learnt them as {model.value}, "
        "so arithmetic will lose more quality than other text."
        + (
            " numerals: digits in parameters recovers part of the loss."
            if model is NumeralScheme.SINGLE_DIGITS
            else ""
        )
    )


def _probes() -> list[str]:
    """Return eight numbers of each length from two to eight digits, always the same."""
    digits = random.Random(0)
    return [str(digits.randrange(10 ** (length - 1), 10**length)) for length in range(2, 9) for _ in range(8)]


def _encode(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, numbers: Sequence[str]) -> list[list[int]]:
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return text_encoder(tokenizer, vocabulary)(numbers)
    return [tokenizer.encode(number, add_special_tokens=False) for number in numbers]


def _from_left(length: int) -> tuple[int, ...]:
    return (_CHUNK,) * (length // _CHUNK) + ((length % _CHUNK,) if length % _CHUNK else ())


_EXPECTED = {
    NumeralScheme.SINGLE_DIGITS: lambda length: (1,) * length,
    NumeralScheme.CHUNKS_FROM_LEFT: _from_left,
    NumeralScheme.CHUNKS_FROM_RIGHT: lambda length: _from_left(length)[::-1],
}
