"""Texts that the base writes itself, so that no data is needed."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from mergekit_omp.healing.alignment import Reader

BATCH = 64
MAX_TOKENS = 224
"""Tokens that are written after each beginning: with it, about a window."""

BEGINNINGS = (
    "",
    "The",
    "In the",
    "When she",
    "Yesterday",
    "According to",
    "Chapter 1\n\n",
    "He looked at",
    "def ",
    "import ",
    "class ",
    "#include <",
    "function ",
    "public static void main(",
    "SELECT ",
    "#!/bin/bash\n",
    "<html>\n",
    "package main\n",
    '{"name": "',
    "| Name | ",
    "12 + 35 = 47\n8 * 7 = 56\n",
    "3417 - 209 = 3208\n",
    "Question: If a train travels 60 km in 45 minutes,",
    "Solve for x: ",
    "Der",
    "Die Stadt",
    "Im Jahr",
    "Le",
    "Dans les",
    "La ville",
    "El",
    "En el año",
    "Il",
    "Nel",
    "O",
    "Em",
    "De",
    "Het is",
    "W",
    "Na",
    "V roce",
    "Bu",
    "Köyün",
    "В",
    "Он",
    "У",
    "Місто",
    "Η",
    "Το",
    "在",
    "我们",
    "一天，",
    "日本",
    "私は",
    "한국",
    "나는",
    "في",
    "كان",
    "בשנת",
    "यह",
    "भारत",
    "ประเทศ",
    "ใน",
    "Thành phố",
    "Trong",
    "I",
)


class Draw(LogitsProcessor):
    """Draws each next token by the cumulative distribution, and leaves only that one possible.

    transformers draws by a random number for each token of the vocabulary, which takes longer than a small model.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (N, V) that are -inf but for the token drawn from the softmax of ``scores`` (N, V)."""
        cumulative = scores.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
        # In [0, 1): the token drawn is the first one whose cumulative probability is above the point.
        points = torch.rand(len(scores), 1, device=scores.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, points, right=True).clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


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
    beginnings = [reader.ids(beginning) for beginning in BEGINNINGS]
    while written < tokens and (not texts or seconds is None or time.monotonic() - started < seconds):
        order = torch.randperm(len(beginnings)).tolist()[:BATCH]
        batch = [[reader.start_id, *beginnings[place]] for place in order]
        longest = max(map(len, batch))
        padded = torch.tensor([[eos_id] * (longest - len(ids)) + ids for ids in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
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
