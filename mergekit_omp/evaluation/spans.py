"""Attribute lost bits to spans: compare the bits of a model's tokens with the ideal bits by its base.

A text is split into spans at the bytes where both tokenizers start a token. In a span with one token of the base, one
forward pass of the base gives the exact probability of the other tokenizer's pieces. The first piece has the mass of
all base tokens whose segmentation starts with it, and each later piece the share of that mass whose segmentation
continues with it. In a span with several tokens of the base there is no such distribution; its ideal bits are the
base's own.

The segmentations are sorted, so tokens that start with the same pieces are neighbours, and each mass is a sum over a
range.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import log

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import TokenKind, Vocabulary


class SpanClass(str, Enum):
    """The relation of a token to the tokens of the base."""

    EQUAL = "equal"  # has the bytes of one token of the base
    FIRST = "first piece"  # of a segmented token of the base
    LATER = "later pieces"  # of a segmented token of the base
    CROSSING = "crossing"  # in a span with several tokens of the base


@dataclass(frozen=True)
class IdealToken:
    """The ideal bits of one token of a text.

    Attributes:
        kind: class of the token.
        bits: -log2 of its probability by the base. In a crossing span the first token has the bits of the span, and
            the others have 0.
    """

    kind: SpanClass
    bits: float


@dataclass(frozen=True)
class SpanScore:
    """The score of all tokens of one class in a text.

    Attributes:
        n_tokens: number of tokens.
        bits: bits of the tokens by the model.
        ideal_bits: bits of the tokens by the base.
    """

    n_tokens: int = 0
    bits: float = 0.0
    ideal_bits: float = 0.0

    def __add__(self, other: "SpanScore") -> "SpanScore":
        """Add two scores."""
        return SpanScore(self.n_tokens + other.n_tokens, self.bits + other.bits, self.ideal_bits + other.ideal_bits)


SpanScores = Mapping[SpanClass, SpanScore]


def score_spans(ideals: Sequence[IdealToken], bits: Sequence[float]) -> dict[SpanClass, SpanScore]:
    """Sum a model's bits and the ideal bits by class.

    Args:
        ideals: ideal bits of each token of a text.
        bits: -log2 of the model's probability of each token.
    """
    scores = {kind: SpanScore() for kind in SpanClass}
    for ideal, cost in zip(ideals, bits, strict=True):
        scores[ideal.kind] += SpanScore(1, cost, ideal.bits)
    return scores


def add_scores(all_scores: Iterable[SpanScores]) -> dict[SpanClass, SpanScore]:
    """Sum the scores of several texts."""
    total = {kind: SpanScore() for kind in SpanClass}
    for scores in all_scores:
        total = {kind: total[kind] + scores[kind] for kind in SpanClass}
    return total


class SpanRuler:
    """Computes the ideal bits of another tokenizer's tokens from a base model's predictions for the same text."""

    def __init__(self, base: Vocabulary, tokenizer: PreTrainedTokenizerBase, output: Vocabulary) -> None:
        """Segment every token of the base with the other tokenizer.

        Args:
            base: vocabulary of the base.
            tokenizer: the other tokenizer.
            output: its vocabulary.
        """
        self._tokenizer, self._output = tokenizer, output
        ids = [id_ for id_, token in base.tokens.items() if token.kind in (TokenKind.ORDINARY, TokenKind.BYTE)]
        splits = zip(map(tuple, pieces(base, tokenizer, ids, output)), ids, strict=True)
        by_split = sorted((split, id_) for split, id_ in splits if split)
        self._splits = [split for split, _ in by_split]
        self._ids = torch.tensor([id_ for _, id_ in by_split], dtype=torch.int64)

    def measure(
        self, window: str, logits: Tensor, base_starts: Sequence[int], base_bits: Sequence[float]
    ) -> list[IdealToken] | None:
        """Compute the ideal bits of the other tokenizer's tokens of a window.

        Args:
            window: text of the window.
            logits: (T, V) of any floating dtype, the base's predictions for its T tokens of the window.
            base_starts: byte offset of each of these tokens, ascending.
            base_bits: bits of each of these tokens by the base.

        Returns:
            The ideal bits of each token; None if the tokens do not reproduce the window byte for byte.
        """
        ids = self._tokenizer(window, add_special_tokens=False).input_ids
        starts = token_starts(ids, window, self._output)
        if starts is None:
            return None
        ideals: list[IdealToken] = []
        common = sorted(set(starts) & set(base_starts))
        for start, end in zip(common, [*common[1:], len(window.encode()) + 1], strict=True):
            split = tuple(ids[bisect_left(starts, start) : bisect_left(starts, end)])
            first, last = bisect_left(base_starts, start), bisect_left(base_starts, end)
            bits = self._of_split(logits[first], split) if last - first == 1 else None
            if bits is None:
                kinds = [SpanClass.CROSSING] * len(split)
                bits = [sum(base_bits[first:last])] + [0.0] * (len(split) - 1)
            else:
                kinds = [SpanClass.FIRST if len(split) > 1 else SpanClass.EQUAL]
                kinds += [SpanClass.LATER] * (len(split) - 1)
            ideals += map(IdealToken, kinds, bits)
        return ideals

    def _of_split(self, logits: Tensor, split: tuple[int, ...]) -> list[float] | None:
        """Return the bits of each piece, given logits (V,); None if no token of the base has this segmentation."""
        logits = logits.float()
        before = logits.logsumexp(dim=0)
        bits = []
        for count in range(1, len(split) + 1):
            ids = self._ids[self._range(split[:count])].to(logits.device)
            if not len(ids):
                return None
            mass = logits[ids].logsumexp(dim=0)
            bits.append((before - mass).item() / log(2))
            before = mass
        return bits

    def _range(self, prefix: tuple[int, ...]) -> slice:
        """Return the range of the tokens whose segmentation starts with these pieces."""
        after = (*prefix[:-1], prefix[-1] + 1)
        return slice(bisect_left(self._splits, prefix), bisect_left(self._splits, after))


def token_starts(ids: Sequence[int], text: str, vocabulary: Vocabulary) -> list[int] | None:
    """Return the byte offset of each token in a text; None if the tokens do not reproduce it."""
    parts = [vocabulary.tokens[id_].data if id_ in vocabulary.tokens else b"" for id_ in ids]
    decoded, expected = b"".join(parts), text.encode()
    if decoded not in (expected, b" " + expected):  # SentencePiece may prepend a space
        return None
    starts, offset = [], len(expected) - len(decoded)
    for part in parts:
        starts.append(max(0, offset))
        offset += len(part)
    return starts
