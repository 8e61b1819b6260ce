"""How well a model reads a text: bits per byte, tokens per byte, and agreement with a base model.

All three count in bytes of UTF-8, so that models with different tokenizers compare.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.spans import IdealToken, SpanRuler, SpanScores, add_scores, score_spans, token_starts
from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary

LOG = logging.getLogger(__name__)

WINDOW_BYTES = 1536
"""Bytes that a model reads at a time: some 400 tokens of English, so that a window fits every model's context."""

_LOGITS_AT_A_TIME = 2**25
TokenizerReader = Callable[[str], PreTrainedTokenizerBase]
"""From a folder or hub id to its tokenizer."""

_SUITES = ("tuning", "held_out")


@dataclass(frozen=True)
class TextScore:
    """A model's score on one text.

    Attributes:
        text: the text's name; "overall" for all of them together.
        n_bytes: bytes of UTF-8 in the text.
        n_tokens: tokens that the model's tokenizer makes of it, without the one put before each window.
        bits: -log2 of the probability that the model gives the text, window by window.
        agreement: share of the positions where both models can go on that have the same greedy next bytes, in [0, 1];
            None without a base model, or where a tokenizer does not give the text back byte for byte.
        n_positions: how many positions ``agreement`` is the mean of.
        spans: the tokens by how they lie over the base's, beside what they should cost; None where no base was named,
            it has the same tokenizer, or a tokenizer does not give the text back byte for byte.
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
        """Lower is better; 8 is knowing nothing."""
        return self.bits / self.n_bytes

    @property
    def tokens_per_byte(self) -> float:
        """Lower is a shorter text for the model."""
        return self.n_tokens / self.n_bytes

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "text": self.text,
            "bits_per_byte": self.bits_per_byte,
            "tokens_per_byte": self.tokens_per_byte,
            "agreement": self.agreement,
            "bytes": self.n_bytes,
            "tokens": self.n_tokens,
            "spans": self.spans
            and {
                kind.value: {
                    "tokens": score.n_tokens,
                    "bits_per_byte": score.bits / self.n_bytes,
                    "ideal_bits_per_byte": score.ideal_bits / self.n_bytes,
                }
                for kind, score in self.spans.items()
            },
        }


@dataclass(frozen=True)
class ModelScore:
    """A model's scores, a text each."""

    model: str
    texts: tuple[TextScore, ...]

    @property
    def overall(self) -> TextScore:
        """All texts as one; agreement is over all positions."""
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
        """What ``--json`` prints."""
        return {
            "model": self.model,
            "texts": [score.as_dict() for score in self.texts],
            "overall": self.overall.as_dict(),
        }


@dataclass(frozen=True)
class Reading:
    """What a model made of one text.

    Attributes:
        bits: -log2 of the text's probability.
        n_tokens: tokens read.
        next_bytes: byte offset of each token's start -> the bytes of the greedy token there. None if the tokens do not
            spell the text byte for byte.
        token_bits: -log2 of the probability of each token.
        ideals: for each ruler what the tokens of the other tokenizer should cost; None where the tokens of either do
            not spell the text.
    """

    bits: float
    n_tokens: int
    next_bytes: Mapping[int, bytes] | None
    token_bits: Sequence[float] = ()
    ideals: Mapping[str, Sequence[IdealToken] | None] = field(default_factory=dict)

    def agreement(self, base: "Reading") -> tuple[float | None, int]:
        """Share of the common token starts where both greedy tokens have the same bytes as far as the shorter goes."""
        if self.next_bytes is None or base.next_bytes is None:
            return None, 0
        common = self.next_bytes.keys() & base.next_bytes.keys()
        if not common:
            return None, 0
        agreed = sum(_same_start(self.next_bytes[offset], base.next_bytes[offset]) for offset in common)
        return agreed / len(common), len(common)


def builtin_texts(suite: str = "held_out") -> dict[str, str]:
    """The texts that come with the package, by name: "held_out", which no choice was made on, or "tuning".

    Raises:
        OmpError: no such suite.
    """
    if suite not in _SUITES:
        raise OmpError(f"The text suite is {suite!r}: choose {' or '.join(map(repr, _SUITES))}.")
    folder = resources.files("mergekit_omp.evaluation") / "texts" / suite
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".txt")), key=lambda item: item.name)
    return {item.name.removesuffix(".txt"): item.read_text(encoding="utf-8") for item in files}


def evaluate(
    models: Sequence[str | Path],
    texts: Mapping[str, str] | None = None,
    *,
    base: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    window_bytes: int = WINDOW_BYTES,
    progress: bool = True,
    trust_remote_code: bool = False,
    read_tokenizer: TokenizerReader | None = None,
) -> list[ModelScore]:
    """Score models on texts, one model in memory at a time.

    Args:
        models: folders or hub ids of causal language models with their tokenizers.
        texts: name -> text; the built-in held-out texts if None.
        base: the model to compare with: its greedy continuations, and what it says that the tokens of a model with
            another tokenizer should cost; if None the first of ``models``, and continuations alone.
        device: where the models run.
        dtype: what the models compute in; log-probabilities are float32 in any case.
        window_bytes: length of the windows that texts are read in.
        progress: show a progress bar, in bytes.
        trust_remote_code: let a model bring its own code.
        read_tokenizer: reads the tokenizer of each model; transformers' ``AutoTokenizer`` if None.

    Raises:
        OmpError: no model, a model that cannot be loaded, no text or an empty one.
    """
    texts = builtin_texts() if texts is None else texts
    _check_request(models, texts)
    read_tokenizer = read_tokenizer or partial(_load_tokenizer, trust_remote_code=trust_remote_code)
    measured = [] if base is None else [str(model) for model in models if str(model) != str(base)]
    base = base or models[0]
    order = [str(base), *(str(model) for model in models if str(model) != str(base))]
    readings: dict[str, dict[str, Reading]] = {}
    total = len(order) * sum(len(text.encode()) for text in texts.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for name in order:
            bar.set_description(Path(name).name)
            tokenizer = read_tokenizer(name)
            others = {other: read_tokenizer(other) for other in measured} if name == order[0] else {}
            model = load_model(name, device, dtype, trust_remote_code)
            vocabulary = read_vocabulary(tokenizer)
            rulers = _rulers(vocabulary, others)
            readings[name] = {
                title: read_text(
                    model,
                    tokenizer,
                    text,
                    window_bytes=window_bytes,
                    progress=bar.update,
                    rulers=rulers,
                    vocabulary=vocabulary,
                )
                for title, text in texts.items()
            }
            del model
    return [
        score_readings(str(model), texts, readings[str(model)], readings[str(base)] if len(order) > 1 else None)
        for model in models
    ]


def score_readings(
    model: str, texts: Mapping[str, str], readings: Mapping[str, Reading], base: Mapping[str, Reading] | None = None
) -> ModelScore:
    """Turn a model's readings, and a base model's, into its scores."""
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
    """Let a model read a text in windows of the same bytes for every model.

    Before each window stands the tokenizer's bos token (eos if it has none), whether its own template adds one or not,
    as in lm-eval's rolling log-likelihood: every byte of the text is predicted, and every model starts alike.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        text: any text that is not empty.
        window_bytes: a window ends at the last line end, else the last space, else the last character before this.
        progress: called with the number of bytes read since the last call.
        rulers: other tokenizers, by a name each, whose tokens of the text are measured by this model.
        vocabulary: the tokenizer's, if it has been read.

    Raises:
        OmpError: the tokenizer has neither bos nor eos, or emits an id that the model has no row for.
    """
    vocabulary = vocabulary or read_vocabulary(tokenizer)
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise OmpError(
            "The tokenizer has neither a bos nor an eos token, and nothing can stand before the first word."
        )
    token_bits: list[float] = []
    offset = 0
    next_bytes: dict[int, bytes] | None = {}
    ideals: dict[str, list[IdealToken] | None] = {name: [] for name in rulers or {}}
    for window in windows(text, window_bytes):
        ids = tokenizer(window, add_special_tokens=False).input_ids
        _check_ids(ids, model)
        logits = _logits([start_id, *ids], model)
        window_bits, greedy = _predict(logits, ids)
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


def _rulers(own: Vocabulary, others: Mapping[str, PreTrainedTokenizerBase]) -> dict[str, SpanRuler]:
    """Rulers for the tokenizers that differ from the model's own."""
    vocabularies = {name: read_vocabulary(other) for name, other in others.items()}
    return {
        name: SpanRuler(own, others[name], vocabulary)
        for name, vocabulary in vocabularies.items()
        if vocabulary != own
    }


def _extended(known: list[IdealToken] | None, more: list[IdealToken] | None) -> list[IdealToken] | None:
    return None if known is None or more is None else known + more


def windows(text: str, window_bytes: int) -> list[str]:
    """Cut a text into pieces of at most ``window_bytes`` bytes that join to it again."""
    if window_bytes < 4:
        raise OmpError(f"The window is {window_bytes} bytes, but one character can take 4: use 4 or more.")
    pieces = []
    rest = text.encode()
    while len(rest) > window_bytes:
        cut = rest.rfind(b"\n", 0, window_bytes) + 1 or rest.rfind(b" ", 1, window_bytes)
        if cut <= 0:
            cut = window_bytes
            while rest[cut] & 0xC0 == 0x80:  # the middle of a character
                cut -= 1
        pieces.append(rest[:cut].decode())
        rest = rest[cut:]
    return [*pieces, rest.decode()] if rest else pieces


def _check_request(models: Sequence[str | Path], texts: Mapping[str, str]) -> None:
    if not models:
        raise OmpError("No model to evaluate: name at least one folder or hub id.")
    if not texts:
        raise OmpError("No text to evaluate on: name at least one file.")
    for title, text in texts.items():
        if not text:
            raise OmpError(f"The text {title} is empty: name a file with something to read.")


def load_model(name: str, device: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode.

    Raises:
        OmpError: it cannot be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise OmpError(f"{name} cannot be loaded as a causal language model with a tokenizer: {error}") from error
    return model.to(device).eval()  # type: ignore[arg-type]  # of transformers, whose `to` loses self


def _load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise OmpError(f"{name} cannot be loaded as a causal language model with a tokenizer: {error}") from error


def _check_ids(ids: Sequence[int], model: PreTrainedModel) -> None:
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if max(ids, default=0) >= rows:
        raise OmpError(
            f"The tokenizer emits id {max(ids)}, but the model has {rows} rows: they do not belong together."
        )


def _logits(ids: Sequence[int], model: PreTrainedModel) -> Tensor:
    """The model's logits (T, V) for each of the T tokens ids[1:]."""
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]


def _predict(logits: Tensor, ids: Sequence[int]) -> tuple[list[float], list[int]]:
    """Return -log2 p of each of the T tokens, given logits (T, V), and the most likely token in its place."""
    followers = torch.tensor(ids, device=logits.device)
    bits: list[float] = []
    greedy: list[int] = []
    step = max(1, _LOGITS_AT_A_TIME // logits.shape[1])
    for start in range(0, len(logits), step):
        part = logits[start : start + step].float()
        chosen = part.gather(1, followers[start : start + step, None])[:, 0]
        bits += ((part.logsumexp(dim=1) - chosen).double() / log(2)).tolist()
        greedy += part.argmax(dim=1).tolist()
    return bits, greedy


def _bytes_of(token: int, vocabulary: Vocabulary) -> bytes:
    known = vocabulary.tokens.get(token)
    return known.data if known else b""


def _same_start(one: bytes, other: bytes) -> bool:
    shorter = min(len(one), len(other))
    return shorter > 0 and one[:shorter] == other[:shorter]
