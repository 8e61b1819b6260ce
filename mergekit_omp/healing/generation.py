"""Texts that the base writes itself, so that no data is needed."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from mergekit_omp.evaluation.chunks import row_chunks
from mergekit_omp.healing.alignment import Reader
from mergekit_omp.healing.beginnings import BEGINNINGS

MAX_TOKENS = 224
"""Tokens that are written after each beginning: with it, about a window."""


class Draw(LogitsProcessor):
    """Draws each next token by the cumulative distribution, and leaves only that one possible.

    transformers draws by a random number for each token of the vocabulary, which takes longer than a small model.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Make scores (N, V) -inf but for the token that is drawn from their softmax."""
        points = torch.rand(len(scores), 1, device=scores.device)  # in [0, 1)
        for rows in row_chunks(scores):
            cumulative = scores[rows].softmax(dim=-1, dtype=torch.float32).cumsum_(dim=-1)
            # The token drawn is the first one whose cumulative probability is above the point.
            drawn = torch.searchsorted(cumulative, points[rows] * cumulative[:, -1:], right=True)
            scores[rows].fill_(-torch.inf).scatter_(1, drawn.clamp_max(scores.shape[1] - 1), 0.0)
        return scores


@torch.inference_mode()
def generate(
    model: PreTrainedModel, reader: Reader, *, seconds: float | None, tokens: int, progress: Callable[[int], Any]
) -> list[str]:
    """Let a model write texts from bos and from short beginnings, until enough time or tokens are used.

    Texts are drawn from the model's own distribution, so that they are what it expects.

    Args:
        model: a causal language model.
        reader: its tokenizer.
        seconds: how long to write; None for as long as ``tokens`` takes. At least one batch is written.
        tokens: how many tokens to write at most.
        progress: called with the number of tokens since the last call.
    """
    started, written = time.monotonic(), 0
    texts: list[str] = []
    eos_id = reader.vocabulary.roles.get("eos", reader.start_id)
    batch = [[reader.start_id, *reader.ids(beginning)] for beginning in BEGINNINGS]
    longest = max(map(len, batch))
    padded = torch.tensor([[eos_id] * (longest - len(ids)) + ids for ids in batch], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
    # In the second half of the time no more are begun, which would be cut short.
    while written < tokens and (not texts or seconds is None or time.monotonic() - started < seconds / 2):
        output = model.generate(  # type: ignore[operator]  # of transformers, where it is a Tensor or a Module
            padded,
            attention_mask=mask,
            do_sample=False,
            logits_processor=LogitsProcessorList([Draw()]),
            repetition_penalty=1.0,
            max_new_tokens=MAX_TOKENS,
            max_time=None if seconds is None else max(1.0, seconds - (time.monotonic() - started)),
            eos_token_id=eos_id,
            pad_token_id=eos_id,
            bos_token_id=reader.start_id,
        )
        for ids, row in zip(batch, output.tolist(), strict=True):
            text_ids = row[longest - len(ids) + 1 :]
            text = reader.tokenizer.decode(text_ids, skip_special_tokens=True)
            texts.append(str(text))
        new = int((output[:, longest:] != eos_id).sum())
        written += new
        progress(new)
    return texts
