"""Make rows of numbers such as ``123`` in a model that tokenises numbers digit by digit.

According to the paper, numbers lose most in a transplant (arXiv:2506.06607). A model of single digits has no row
similar to that of 123. Whatever its neighbours in the donor are, such a model understands the mean of the rows of 1, 2
and 3 best. The logit of that mean is far too high, since all numbers with the same first digits share it: every digit
after the first divides the probability by ten. Hence

    row(123) = mean of the rows of 1, 2 and 3 - 2 · ln 10 · u

in a matrix that computes logits. u is the direction along which a row changes its logit by 1 in an average context.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.initializers.base import NewTokens, RowFunction

SHIFT = math.log(10)
"""Reduction of the logit for each digit after the first, in nats."""


@dataclass(frozen=True)
class LogitShift:
    """The direction along which rows of a model change their logits.

    Attributes:
        direction: float32 (D,), u: adding it to a row increases the logit by 1, on average over contexts.
        tied: whether the input embedding computes the logits too.
    """

    direction: Tensor
    tied: bool


@dataclass(frozen=True)
class Numbers:
    """New tokens that are numbers of several digits, in a model with one token per digit.

    Attributes:
        places: int64 (M,), indices among the B targets.
        pieces: the model's rows of the pieces of each number, in order: its digits, and a space before them.
        lengths: int64 (M,), digits of each number.
    """

    places: Tensor
    pieces: Sequence[Sequence[int]]
    lengths: Tensor


def find_numbers(new: NewTokens) -> Numbers:
    """Find the numbers among new tokens."""
    ids = new.problem.target_ids.tolist()
    numbers = [place for place, id_ in enumerate(ids) if _is_number(new.output.tokens[id_].data)]
    split = new.pieces([ids[place] for place in numbers])
    by_digit = {
        place: rows
        for place, rows in zip(numbers, split, strict=True)
        if len(rows) > 1 and all(len(new.model.tokens[row].data.strip()) <= 1 for row in rows)
    }
    lengths = [len(new.output.tokens[ids[place]].data.strip()) for place in by_digit]
    places, counts = torch.tensor(list(by_digit), dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
    return Numbers(places, list(by_digit.values()), counts)


def with_numbers(make: RowFunction, numbers: Numbers, shift: LogitShift) -> RowFunction:
    """Return a function that makes rows of numbers from their digits and all other rows by ``make``."""
    reduction = SHIFT * (numbers.lengths - 1)

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        new_rows = make(weight, is_head)
        if weight.ndim != 2 or not len(numbers.places):
            return new_rows
        of_digits = torch.stack([weight[list(split)].float().mean(dim=0) for split in numbers.pieces])
        if is_head or shift.tied:
            of_digits -= reduction.to(weight.device)[:, None] * shift.direction.to(weight.device)
        new_rows = new_rows.float().clone()
        new_rows[numbers.places.to(new_rows.device)] = of_digits
        return new_rows

    return rows


def _is_number(data: bytes) -> bool:
    text = data.removeprefix(b" ")
    return len(text) > 1 and text.isdigit()
