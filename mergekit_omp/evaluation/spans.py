"""Where a model with another tokenizer loses bits: its tokens beside what its base says that they should cost.

A text is cut into spans at the bytes where both tokenizers begin a token. In a span with one token of the base, one
pass of the base gives the exact probability of the other tokenizer's pieces: the first piece gets the mass of all base
tokens whose split begins with it, and each later piece the share of that mass whose split goes on with it. In a span
with several tokens of the base there is no such distribution; there the base's own bits are the ideal.

The splits are sorted, so that the tokens that begin with the same pieces are neighbours, and each mass is a sum over a
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
    """How a token lies over the tokens of the base."""

    EQUAL = "equal"  # the same bytes as one token of the base
    FIRST = "first piece"  # of a token of the base that is split
    LATER = "later pieces"  # of a token of the base that is split
    CROSSING = "crossing"  # in a span with several tokens of the base


@dataclass(frozen=True)
class IdealToken:
    """What a token of a text should cost.

    Attributes:
        kind: how it lies over the tokens of the base.
        bits: -log2 of its probability by the base. In a crossing span the first token has the bits of the whole span,
            and the others 0.
    """

    kind: SpanClass
    bits: float


@dataclass(frozen=True)
class SpanScore:
    """All tokens of one class in a text.

    Attributes:
        n_tokens: how many there are.
        bits: what they cost the model.
        ideal_bits: what they should cost.
    """

    n_tokens: int = 0
    bits: float = 0.0
    ideal_bits: float = 0.0

    def __add__(self, other: "SpanScore") -> "SpanScore":
        """Both together."""
        return SpanScore(self.n_tokens + other.n_tokens, self.bits + other.bits, self.ideal_bits + other.ideal_bits)


SpanScores = Mapping[SpanClass, SpanScore]


def score_spans(ideals: Sequence[IdealToken], bits: Sequence[float]) -> dict[SpanClass, SpanScore]:
    """Sum a model's bits and the ideal ones by class.

    Args:
        ideals: of each token of a text.
        bits: -log2 of the probability that the model gives the same tokens.
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
    """What the tokens of another tokenizer should cost, by a base model that reads the same text."""

    def __init__(self, base: Vocabulary, tokenizer: PreTrainedTokenizerBase, output: Vocabulary) -> None:
        """Split every token of the base as the other tokenizer does.

        Args:
            base: the base's vocabulary.
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
        """Measure the tokens that the other tokenizer makes of a window.

        Args:
            window: a text.
            logits: (T, V) of the base, any floating dtype, before each of its T tokens of the window.
            base_starts: the byte at which each of these tokens begins, ascending.
            base_bits: what each of these tokens cost the base.

        Returns:
            One for each token; None where they do not spell the window byte for byte.
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
        """Bits of each piece, given logits (V,); None where no token of the base is split so."""
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
        """Where the tokens are whose split begins with these pieces."""
        after = (*prefix[:-1], prefix[-1] + 1)
        return slice(bisect_left(self._splits, prefix), bisect_left(self._splits, after))


def token_starts(ids: Sequence[int], text: str, vocabulary: Vocabulary) -> list[int] | None:
    """The byte of a text at which each token begins; None if the tokens do not spell it."""
    parts = [vocabulary.tokens[id_].data if id_ in vocabulary.tokens else b"" for id_ in ids]
    spelt, expected = b"".join(parts), text.encode()
    if spelt not in (expected, b" " + expected):  # SentencePiece may put a space before a text
        return None
    starts, offset = [], len(expected) - len(spelt)
    for part in parts:
        starts.append(max(0, offset))
        offset += len(part)
    return starts
