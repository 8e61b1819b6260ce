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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import log

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_omp.evaluation.chunks import row_chunks
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import Vocabulary

_TERMS_AT_A_TIME = 2**22
"""Logits that are summed at a time, for the reason that ``row_chunks`` has."""


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


def spans_as_dict(scores: SpanScores, n_bytes: int) -> dict[str, dict[str, float]]:
    """Return the scores of a text of ``n_bytes`` as records and ``--json`` have them."""
    return {
        kind.value: {
            "tokens": score.n_tokens,
            "bits_per_byte": score.bits / n_bytes,
            "ideal_bits_per_byte": score.ideal_bits / n_bytes,
        }
        for kind, score in scores.items()
    }


@dataclass(frozen=True)
class Span:
    """The bytes between two neighbouring boundaries that both tokenizers have.

    Attributes:
        base: the range of the base's tokens.
        output: the range of the other tokenizer's tokens.
    """

    base: range
    output: range


def find_spans(base_starts: Sequence[int], output_starts: Sequence[int], n_bytes: int) -> list[Span]:
    """Find the spans of a text in order.

    Args:
        base_starts: byte offset of each of the base's tokens, ascending.
        output_starts: byte offset of each of the other tokenizer's tokens, ascending.
        n_bytes: length of the text in bytes.
    """
    common = sorted(set(base_starts) & set(output_starts))
    return [
        Span(_range(base_starts, start, end), _range(output_starts, start, end))
        for start, end in zip(common, [*common[1:], n_bytes + 1], strict=True)
    ]


def _range(starts: Sequence[int], start: int, end: int) -> range:
    return range(bisect_left(starts, start), bisect_left(starts, end))


class SpanRuler:
    """Computes the ideal bits of another tokenizer's tokens from a base model's predictions for the same text.

    Attributes:
        splits: the other tokenizer's pieces of every token of the base that it can spell, sorted.
        ids: (N,) int64, the base's token of each split.
    """

    def __init__(self, base: Vocabulary, tokenizer: PreTrainedTokenizerBase, output: Vocabulary) -> None:
        """Segment every token of the base with the other tokenizer.

        Args:
            base: vocabulary of the base.
            tokenizer: the other tokenizer.
            output: its vocabulary.
        """
        self._tokenizer, self._output = tokenizer, output
        ids = [id_ for id_, token in base.tokens.items() if token.is_text]
        splits = zip(map(tuple, pieces(base, tokenizer, ids, output)), ids, strict=True)
        by_split = sorted((split, id_) for split, id_ in splits if split)
        self.splits = [split for split, _ in by_split]
        self.ids = torch.tensor([id_ for _, id_ in by_split], dtype=torch.int64)

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
        spans = find_spans(base_starts, starts, len(window.encode()))
        exact = {
            span.base.start: ranges
            for span in spans
            if len(span.base) == 1 and (ranges := self._ranges(tuple(ids[place] for place in span.output)))
        }
        bits = dict(zip(exact, self._bits(logits, exact), strict=True))
        ideals: list[IdealToken] = []
        for span in spans:
            later = len(span.output) - 1
            if span.base.start in bits:
                kinds = [SpanClass.FIRST if later else SpanClass.EQUAL] + [SpanClass.LATER] * later
                ideals += map(IdealToken, kinds, bits[span.base.start])
            else:
                ideals.append(IdealToken(SpanClass.CROSSING, sum(base_bits[place] for place in span.base)))
                ideals += [IdealToken(SpanClass.CROSSING, 0.0)] * later
        return ideals

    def _bits(self, logits: Tensor, exact: Mapping[int, Sequence[slice]]) -> list[list[float]]:
        """Bits of each piece of some spans.

        Args:
            logits: (T, V) of the base.
            exact: for each span, by its row of ``logits``, where the tokens are that begin with its first piece, with
                its first two pieces, and so on.
        """
        places = torch.tensor(list(exact), dtype=torch.int64)
        counts = torch.tensor([len(ranges) for ranges in exact.values()], dtype=torch.int64)
        masses = self._log_masses(
            logits, places.repeat_interleave(counts), [one for ranges in exact.values() for one in ranges]
        )
        bits = []
        for total, mass in zip(_log_totals(logits, places), masses.split(counts.tolist()), strict=True):
            bits.append((torch.cat([total[None], mass]).diff().neg() / log(2)).tolist())
        return bits

    def _log_masses(self, logits: Tensor, places: Tensor, ranges: Sequence[slice]) -> Tensor:
        """Logarithms (P,), float64, of sums of exp(logits) over P ranges of ``ids``, each in a row of logits (T, V).

        They are sums of the terms themselves, not differences of a cumulative sum, in which a small mass would vanish.
        """
        device = logits.device
        sizes = torch.tensor([one.stop - one.start for one in ranges], dtype=torch.int64)
        starts = torch.tensor([one.start for one in ranges], dtype=torch.int64)
        result = []
        for part in _parts(sizes):
            size = sizes[part]
            segment = torch.arange(len(size)).repeat_interleave(size)
            within = torch.arange(len(segment)) - (size.cumsum(0) - size)[segment]
            ids = self.ids[starts[part][segment] + within]
            terms = logits[places[part][segment].to(device), ids.to(device)].double()
            segment = segment.to(device)
            top = terms.new_full((len(size),), -torch.inf).scatter_reduce(0, segment, terms, "amax")
            top = top.clamp(min=torch.finfo(top.dtype).min)  # of terms that are all -inf
            sums = torch.zeros_like(top).index_add(0, segment, (terms - top[segment]).exp())
            result.append((top + sums.log()).cpu())
        return torch.cat([torch.zeros(0, dtype=torch.float64), *result])

    def _ranges(self, split: tuple[int, ...]) -> list[slice]:
        """Where the tokens are that begin with each start of a split; [] where no token of the base is split so."""
        ranges = [self.range_of(split[:count]) for count in range(1, len(split) + 1)]
        return ranges if all(one.start < one.stop for one in ranges) else []

    def is_known(self, split: tuple[int, ...]) -> bool:
        """Whether the segmentation of a token of the base starts with these pieces."""
        found = self.range_of(split)
        return found.start < found.stop

    def range_of(self, prefix: tuple[int, ...]) -> slice:
        """Return the range of the tokens whose segmentation starts with these pieces."""
        after = (*prefix[:-1], prefix[-1] + 1)
        return slice(bisect_left(self.splits, prefix), bisect_left(self.splits, after))


def _log_totals(logits: Tensor, places: Tensor) -> Tensor:
    """Logarithms (P,), float64, of the sums of exp over P different rows of logits (T, V)."""
    parts = (places[chunk].to(logits.device) for chunk in row_chunks(logits[: len(places)]))
    totals = [logits[part].float().logsumexp(dim=1).double().cpu() for part in parts]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *totals])


def _parts(sizes: Tensor) -> Iterator[slice]:
    """Cut ranges into groups of at most some number of terms together, or of one range."""
    ends = sizes.cumsum(0)
    start = 0
    while start < len(sizes):
        before = int(ends[start] - sizes[start])
        end = max(start + 1, int(torch.searchsorted(ends, before + _TERMS_AT_A_TIME, right=True)))
        yield slice(start, end)
        start = end


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
