"""Rows for numbers such as ``123`` in a model that reads and writes numbers digit by digit.

The paper names numbers as what transplants cost most. A model that knows single digits has no row like that of 123:
whatever the donor's neighbours of it are, the mean of the rows of 1, 2 and 3 is what such a model understands best.
As a logit that mean is far too high, since every number that begins with the same digits has it too: given the first
digit, each one after it divides what is left of the probability by ten. Hence

    row(123) = mean of the rows of 1, 2 and 3 - 2 · ln 10 · u

in a matrix that makes logits. u is the direction in which a row moves its logit by 1 in an average context.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.vocabulary.segmentation import pieces

SHIFT = math.log(10)
"""What each digit after the first takes from a logit, in nats."""


@dataclass(frozen=True)
class LogitShift:
    """How rows of a model change their logits.

    Attributes:
        direction: float32 [D], u: a row that has it added has its logit raised by 1, on average over contexts.
        tied: whether the input embedding makes the logits too.
    """

    direction: Tensor
    tied: bool


@dataclass(frozen=True)
class Numbers:
    """The new tokens that are numbers of several digits, each of which the model writes as a token of its own.

    Attributes:
        places: int64 [M], among the B targets.
        digits: for each of them the model's rows of its pieces, in order.
    """

    places: Tensor
    digits: Sequence[Sequence[int]]


def find_numbers(new: NewTokens) -> Numbers:
    """Find them; a space before the digits is a piece like them."""
    ids = new.problem.target_ids.tolist()
    numbers = [place for place, id_ in enumerate(ids) if _is_number(new.output.tokens[id_].data)]
    split = pieces(new.output, new.tokenizer, [ids[place] for place in numbers], new.model)
    by_digit = {
        place: rows
        for place, rows in zip(numbers, split, strict=True)
        if len(rows) > 1 and all(len(new.model.tokens[row].data.strip()) <= 1 for row in rows)
    }
    return Numbers(torch.tensor(list(by_digit), dtype=torch.int64), list(by_digit.values()))


def with_numbers(make: RowFunction, numbers: Numbers, shift: LogitShift) -> RowFunction:
    """Rows as ``make`` gives them, but those of numbers from their digits."""
    lowered = SHIFT * torch.tensor([len(rows) - 1 for rows in numbers.digits])

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        made = make(weight, is_head)
        if weight.ndim != 2 or not len(numbers.places):
            return made
        of_digits = torch.stack([weight[list(digits)].float().mean(dim=0) for digits in numbers.digits])
        if is_head or shift.tied:
            of_digits -= lowered.to(weight.device)[:, None] * shift.direction.to(weight.device)
        made = made.float().clone()
        made[numbers.places.to(made.device)] = of_digits
        return made

    return rows


def _is_number(data: bytes) -> bool:
    text = data.removeprefix(b" ")
    return len(text) > 1 and text.isdigit()
