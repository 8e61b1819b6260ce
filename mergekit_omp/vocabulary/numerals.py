"""How tokenizers split numbers, since models that split them differently reckon differently.

Goddard and Fernandes Neto (2025), who propose OMP for transplants, name mismatched numerals as what costs mathematical
ability.
"""

import random
from collections.abc import Sequence
from enum import Enum

from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.segmentation import text_encoder
from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary

_CHUNK = 3
_LONGEST_WHOLE = 4


class NumeralScheme(str, Enum):
    """How a tokenizer splits a number of several digits."""

    SINGLE_DIGITS = "single digits"
    CHUNKS_FROM_LEFT = "chunks of up to three digits from the left"  # 1234567 -> 123 456 7
    CHUNKS_FROM_RIGHT = "chunks of up to three digits from the right"  # 1234567 -> 1 234 567
    WHOLE = "whole numbers"  # of up to four digits
    MIXED = "chunks of varying length"  # whatever the merges make of them, as in GPT-2


def numeral_scheme(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary | None = None) -> NumeralScheme:
    """Find out how a tokenizer splits numbers, by letting it split some of two to eight digits.

    Args:
        tokenizer: the tokenizer.
        vocabulary: its vocabulary; read from it if None.
    """
    vocabulary = vocabulary or read_vocabulary(tokenizer)
    numbers = _probes()
    encoded = list(_encode(tokenizer, vocabulary, numbers))
    if any(id_ not in vocabulary.tokens for ids in encoded for id_ in ids):
        vocabulary = read_vocabulary(tokenizer)  # a model may have rows for fewer tokens than its tokenizer writes
    splits = [
        (len(number), tuple(filter(None, (len(vocabulary.tokens[id_].data.strip()) for id_ in ids))))
        for number, ids in zip(numbers, encoded, strict=True)
    ]
    for scheme, expected in _EXPECTED.items():
        if all(split == expected(length) for length, split in splits):
            return scheme
    if all(split == (length,) for length, split in splits if length <= _LONGEST_WHOLE):
        return NumeralScheme.WHOLE
    return NumeralScheme.MIXED


def numeral_warning(output: NumeralScheme, model: NumeralScheme) -> str | None:
    """A sentence on what it costs that the output tokenizer splits numbers as ``output`` and the model as ``model``.

    None if both split them alike, so that it costs nothing.
    """
    if output is model and output is not NumeralScheme.MIXED:
        return None
    return (
        f"The output tokenizer writes numbers as {output.value} and the model learnt them as {model.value}, "
        "so expect arithmetic to suffer more than other text does."
        + (" numerals: digits in parameters takes part of that back." if model is NumeralScheme.SINGLE_DIGITS else "")
    )


def _probes() -> list[str]:
    """Eight numbers of each length from two to eight digits, the same ones each time."""
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
