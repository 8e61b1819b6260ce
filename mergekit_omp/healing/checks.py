"""Checks of a model on held-out windows: bits per byte, and the gap to its base by span class."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_omp.evaluation.bits_per_byte import bits_of_tokens
from mergekit_omp.evaluation.spans import IdealToken, SpanRuler, SpanScores, add_scores, score_spans
from mergekit_omp.healing.alignment import AlignedWindow, Reader

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Check:
    """A model's score on held-out windows.

    Attributes:
        tokens: how many tokens it was trained on before.
        seconds: how long the run had taken, this check included.
        bits_per_byte: -log2 of the probability of the windows' tokens, per byte of UTF-8.
        spans: the tokens by how they lie over the base's, beside what they should cost.
    """

    tokens: int
    seconds: float
    bits_per_byte: float
    spans: SpanScores


class Checker:
    """Held-out windows, with what the base says of them."""

    def __init__(
        self, windows: Sequence[AlignedWindow], base: PreTrainedModel, reader: Reader, output: Reader, ruler: SpanRuler
    ) -> None:
        """Run the base over the windows, once.

        Args:
            windows: at least one.
            base: the base model.
            reader: its tokenizer.
            output: the output's tokenizer.
            ruler: how that splits the base's tokens.
        """
        self._windows, self._output, self._device = windows, output, base.device
        self.n_bytes = sum(len(window.text.encode()) for window in windows)
        self._ideals: list[Sequence[IdealToken]] = []
        base_bits = 0.0
        for window in windows:
            logits = _run(
                lambda ids: base(input_ids=ids, use_cache=False).logits, window.base_ids, reader, base.device
            )
            bits = bits_of_tokens(logits, window.base_ids)
            base_bits += sum(bits)
            ideals = ruler.measure(window.text, logits, window.base_starts, bits)
            assert ideals is not None  # an aligned window is spelled by both
            self._ideals.append(ideals)
        self.base_bits_per_byte = base_bits / self.n_bytes

    def check(self, logits_of: Logits, tokens: int, started: float) -> Check:
        """Measure a model.

        Args:
            logits_of: its logits (1, T, V), given ids (1, T).
            tokens: how many tokens it was trained on.
            started: when the run began, by the monotonic clock.
        """
        scores, total = [], 0.0
        for window, ideals in zip(self._windows, self._ideals, strict=True):
            bits = bits_of_tokens(_run(logits_of, window.output_ids, self._output, self._device), window.output_ids)
            total += sum(bits)
            scores.append(score_spans(ideals, bits))
        seconds = time.monotonic() - started
        return Check(tokens, seconds, total / self.n_bytes, add_scores(scores))


@torch.no_grad()
def _run(logits_of: Logits, ids: Sequence[int], reader: Reader, device: torch.device) -> Tensor:
    """Return the logits (T, V) before each of T tokens."""
    context = torch.tensor([[reader.start_id, *ids[:-1]]], device=device)
    return logits_of(context)[0]
