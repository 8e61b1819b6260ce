"""Score a model on texts: bits per byte, tokens per byte, and agreement with a base model.

All three are per byte of UTF-8, so models with different tokenizers are comparable.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from math import log
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.chunks import row_chunks
from mergekit_omp.evaluation.spans import (
    IdealToken,
    SpanRuler,
    SpanScores,
    add_scores,
    score_spans,
    spans_as_dict,
    token_starts,
)
from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary

LOG = logging.getLogger(__name__)

WINDOW_BYTES = 1536
"""Default length of a window in bytes: about 400 tokens of English, which fit every model's context."""

_SUITES = ("tuning", "held_out")


@dataclass(frozen=True)
class TextScore:
    """A model's score on one text.

    Attributes:
        text: name of the text, or "overall" for all texts.
        n_bytes: length of the text in bytes of UTF-8.
        n_tokens: number of its tokens, without the start token of each window.
        bits: -log2 of the model's probability of the text, summed over the windows.
        agreement: share in [0, 1] of the common token starts at which both models predict the same bytes greedily;
            None without a base model, or if a tokenizer does not reproduce the text byte for byte.
        n_positions: number of positions that ``agreement`` is the mean of.
        spans: bits and ideal bits by class of token; None without a base, if the base has the same tokenizer, or if a
            tokenizer does not reproduce the text byte for byte.
    """

    text: str
    n_bytes: int
    n_tokens: int
    bits: float
    agreement: float | None = None
    n_positions: int = 0
    spans: SpanScores | None = None

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8; lower is better, and 8 is a uniform distribution over bytes."""
        return self.bits / self.n_bytes

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of UTF-8; lower means shorter sequences."""
        return self.n_tokens / self.n_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the score as ``--json`` prints it."""
        return {
            "text": self.text,
            "bits_per_byte": self.bits_per_byte,
            "tokens_per_byte": self.tokens_per_byte,
            "agreement": self.agreement,
            "bytes": self.n_bytes,
            "tokens": self.n_tokens,
            "spans": self.spans and spans_as_dict(self.spans, self.n_bytes),
        }


@dataclass(frozen=True)
class ModelScore:
    """A model's scores, one per text."""

    model: str
    texts: tuple[TextScore, ...]

    @property
    def overall(self) -> TextScore:
        """The score of all texts together; agreement is the mean over all positions."""
        known = [(score.agreement, score.n_positions) for score in self.texts if score.agreement is not None]
        positions = sum(count for _, count in known)
        agreed = sum(agreement * count for agreement, count in known)
        return TextScore(
            text="overall",
            n_bytes=sum(score.n_bytes for score in self.texts),
            n_tokens=sum(score.n_tokens for score in self.texts),
            bits=sum(score.bits for score in self.texts),
            agreement=agreed / positions if positions else None,
            n_positions=positions,
            spans=self._all_spans(),
        )

    def _all_spans(self) -> SpanScores | None:
        known = [score.spans for score in self.texts if score.spans is not None]
        return add_scores(known) if len(known) == len(self.texts) else None

    def as_dict(self) -> dict[str, Any]:
        """Return the score as ``--json`` prints it."""
        return {
            "model": self.model,
            "texts": [score.as_dict() for score in self.texts],
            "overall": self.overall.as_dict(),
        }


@dataclass(frozen=True)
class Reading:
    """A model's predictions for one text.

    Attributes:
        bits: -log2 of the text's probability.
        n_tokens: number of tokens.
        next_bytes: bytes of the greedy token at the byte offset of each token's start. None if the tokens do not
            reproduce the text byte for byte.
        token_bits: -log2 of the probability of each token.
        ideals: for each ruler the ideal bits of the other tokenizer's tokens; None if the tokens of either do not
            reproduce the text.
    """

    bits: float
    n_tokens: int
    next_bytes: Mapping[int, bytes] | None
    token_bits: Sequence[float] = ()
    ideals: Mapping[str, Sequence[IdealToken] | None] = field(default_factory=dict)

    def agreement(self, base: "Reading") -> tuple[float | None, int]:
        """Return the share of common token starts with equal greedy bytes (up to the shorter), and their number."""
        if self.next_bytes is None or base.next_bytes is None:
            return None, 0
        common = self.next_bytes.keys() & base.next_bytes.keys()
        if not common:
            return None, 0
        agreed = sum(_same_start(self.next_bytes[offset], base.next_bytes[offset]) for offset in common)
        return agreed / len(common), len(common)


def builtin_texts(suite: str = "held_out") -> dict[str, str]:
    """Read the texts that come with the package.

    Args:
        suite: "held_out", on which no design decision was made, or "tuning".

    Returns:
        The texts by name.

    Raises:
        OmpError: if the suite does not exist.

    Example:
        >>> from mergekit_omp.evaluation.bits_per_byte import builtin_texts
        >>> "arithmetic" in builtin_texts("held_out")
        True
    """
    if suite not in _SUITES:
        raise OmpError(f"The text suite is {suite!r}: choose {' or '.join(map(repr, _SUITES))}.")
    folder = resources.files("mergekit_omp.evaluation") / "texts" / suite
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".txt")), key=lambda item: item.name)
    return {item.name.removesuffix(".txt"): item.read_text(encoding="utf-8") for item in files}


def score_readings(
    model: str, texts: Mapping[str, str], readings: Mapping[str, Reading], base: Mapping[str, Reading] | None = None
) -> ModelScore:
    """Compute a model's scores from its readings and those of a base model."""
    scores = []
    for title, text in texts.items():
        reading = readings[title]
        agreement, positions = reading.agreement(base[title]) if base else (None, 0)
        ideals = base[title].ideals.get(model) if base else None
        spans = score_spans(ideals, reading.token_bits) if ideals is not None else None
        size = len(text.encode())
        scores.append(TextScore(title, size, reading.n_tokens, reading.bits, agreement, positions, spans))
    return ModelScore(model, tuple(scores))


@torch.inference_mode()
def read_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window_bytes: int = WINDOW_BYTES,
    progress: Any = None,
    rulers: Mapping[str, SpanRuler] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Reading:
    """Compute a model's predictions for a text, in windows that do not depend on the tokenizer.

    Each window starts with the tokenizer's bos token (or eos if it has none), whatever its own template adds, as in
    lm-eval's rolling log-likelihood. So every byte of the text is predicted, in the same way for every model.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        text: any non-empty text.
        window_bytes: maximum length of a window. It ends at the last line end before this, or else the last space, or
            else the last character.
        progress: callback that receives the number of bytes read since its last call.
        rulers: rulers for other tokenizers by name; this model computes the ideal bits of their tokens.
        vocabulary: the tokenizer's vocabulary, if it has been read.

    Returns:
        The predictions.

    Raises:
        OmpError: if the tokenizer has neither bos nor eos, or emits an id that the model has no row for.
    """
    vocabulary = vocabulary or read_vocabulary(tokenizer)
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise OmpError("The tokenizer has neither a bos nor an eos token to start a window with; set its bos_token.")
    token_bits: list[float] = []
    offset = 0
    next_bytes: dict[int, bytes] | None = {}
    ideals: dict[str, list[IdealToken] | None] = {name: [] for name in rulers or {}}
    for window in windows(text, window_bytes):
        ids = tokenizer(window, add_special_tokens=False).input_ids
        _check_ids(ids, model)
        logits = _logits([start_id, *ids], model)
        window_bits, greedy = bits_of_tokens(logits, ids), logits.argmax(dim=1).tolist()
        token_bits += window_bits
        starts = token_starts(ids, window, vocabulary)
        for name, ruler in (rulers or {}).items():
            more = None if starts is None else ruler.measure(window, logits, starts, window_bits)
            ideals[name] = _extended(ideals[name], more)
        if starts is None:
            next_bytes = None
        elif next_bytes is not None:
            next_bytes |= {
                offset + start: _bytes_of(token, vocabulary) for start, token in zip(starts, greedy, strict=True)
            }
        size = len(window.encode())
        offset += size
        if progress is not None:
            progress(size)
    return Reading(sum(token_bits), len(token_bits), next_bytes, token_bits, ideals)


def _extended(known: list[IdealToken] | None, more: list[IdealToken] | None) -> list[IdealToken] | None:
    return None if known is None or more is None else known + more


def windows(text: str, window_bytes: int) -> list[str]:
    r"""Split a text into windows of at most ``window_bytes`` bytes of UTF-8.

    Raises:
        OmpError: if ``window_bytes`` is less than 4.

    Example:
        >>> from mergekit_omp.evaluation.bits_per_byte import windows
        >>> windows("One line.\nAnother line.", 12)
        ['One line.\n', 'Another', ' line.']
    """
    if window_bytes < 4:
        raise OmpError(f"The window is {window_bytes} bytes, but one character can take 4: use 4 or more.")
    data = text.encode()
    found, start = [], 0
    while len(data) - start > window_bytes:
        end = start + window_bytes
        cut = data.rfind(b"\n", start, end) + 1 or data.rfind(b" ", start + 1, end)
        if cut <= start:
            cut = end
            while data[cut] & 0xC0 == 0x80:  # the middle of a character
                cut -= 1
        found.append(data[start:cut].decode())
        start = cut
    return [*found, data[start:].decode()] if start < len(data) else found


def _check_ids(ids: Sequence[int], model: PreTrainedModel) -> None:
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if max(ids, default=0) >= rows:
        raise OmpError(
            f"The tokenizer emits id {max(ids)}, but the model has {rows} rows: they do not belong together."
        )


def _logits(ids: Sequence[int], model: PreTrainedModel) -> Tensor:
    """Return the model's logits (T, V) for the T tokens ids[1:]."""
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]


def bits_of_tokens(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """Return -log2 of the probability of each of T tokens.

    Args:
        logits: (T, V) of any floating dtype, before each token.
        ids: the tokens.
    """
    followers = torch.tensor(ids, device=logits.device)
    bits: list[float] = []
    for rows in row_chunks(logits):
        part = logits[rows].float()
        chosen = part.gather(1, followers[rows, None])[:, 0]
        bits += ((part.logsumexp(dim=1) - chosen).double() / log(2)).tolist()
    return bits


def _bytes_of(token: int, vocabulary: Vocabulary) -> bytes:
    known = vocabulary.tokens.get(token)
    return known.data if known else b""


def _same_start(one: bytes, other: bytes) -> bool:
    shorter = min(len(one), len(other))
    return shorter > 0 and one[:shorter] == other[:shorter]
