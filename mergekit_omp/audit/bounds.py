"""How likely new tokens may be: never more than the base's tokens that agree with their bytes.

The base gives a text that begins with some bytes at most the probability of all of its tokens that begin with them or
that they begin with. A new token's row gives it a probability of its own; where that is far above the bound, the row
says what the token's bytes do not.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.vocabulary.tokens import Vocabulary

EXCESS = 10.0
"""A probability this many times the bound is counted."""

FLOOR = 1e-5
"""Less likely tokens are not counted, whatever their bound: they are next to never written."""

_STATES_AT_A_TIME = 16


@dataclass(frozen=True)
class Excess:
    """How far N tokens are above their bounds, over S states.

    Attributes:
        share: (N,) of the states where the probability is over ``FLOOR`` and more than ``EXCESS`` times the bound.
        ratio: (N,) the largest probability divided by its bound, or by ``FLOOR`` where that is more.
        probability: (N,) the largest.
    """

    share: Tensor
    ratio: Tensor
    probability: Tensor


class ByteBounds:
    """The probability that a base gives to all of its tokens that agree with given bytes."""

    def __init__(self, base: Vocabulary, data: Sequence[bytes | None]) -> None:
        """Sort the base's tokens by their bytes.

        Args:
            base: the base's vocabulary.
            data: what each of N tokens stands for; None for one that no text stands for, whose bound is 0.
        """
        text = [token for token in base.tokens.values() if token.is_text]
        by_bytes = sorted((token.data, token.id) for token in text if token.data)
        token_bytes = [known for known, _ in by_bytes]
        self._ids = torch.tensor([id_ for _, id_ in by_bytes], dtype=torch.int64)
        longest = max(map(len, token_bytes), default=0)
        after = b"\xff" * (longest + 1)  # no token of the base is after some bytes and these
        self._starts = torch.tensor([0 if one is None else bisect_left(token_bytes, one) for one in data])
        self._ends = torch.tensor([0 if one is None else bisect_left(token_bytes, one + after) for one in data])
        places: dict[bytes, list[int]] = {}
        for place, one in enumerate(token_bytes):
            places.setdefault(one, []).append(place)
        prefixes = [
            (index, place)
            for index, one in enumerate(data)
            for end in range(1, min(len(one or b""), longest + 1))
            for place in places.get((one or b"")[:end], ())
        ]
        self._owners, self._prefixes = torch.tensor(prefixes, dtype=torch.int64).reshape(-1, 2).unbind(1)

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Bounds (S, N), given the base's probabilities (S, V), both float64."""
        by_bytes = probabilities[:, self._ids]
        sums = torch.nn.functional.pad(by_bytes.cumsum(dim=1), (1, 0))
        bounds = sums[:, self._ends] - sums[:, self._starts]
        return bounds.index_add_(1, self._owners, by_bytes[:, self._prefixes]).clamp_(min=0)


def excess_over_bounds(bounds: ByteBounds, base_logits: Tensor, logits: Tensor) -> Excess:
    """Compare the probabilities of N tokens with their bounds.

    Args:
        bounds: of the N tokens.
        base_logits: (S, V) of the base.
        logits: (S, N) of the tokens. What they would be beside the base's own tokens is their probability, so that
            tokens which the transplant dropped do not make the others likelier.
    """
    share = torch.zeros(logits.shape[1], dtype=torch.float64)
    ratio, probability = torch.zeros_like(share), torch.zeros_like(share)
    for start in range(0, len(logits), _STATES_AT_A_TIME):
        part = base_logits[start : start + _STATES_AT_A_TIME].double()
        total = part.logsumexp(dim=1, keepdim=True)
        found = (logits[start : start + _STATES_AT_A_TIME].double() - total).exp()
        bound = bounds((part - total).exp())
        share += ((found > FLOOR) & (found > EXCESS * bound)).sum(dim=0)
        ratio = torch.maximum(ratio, (found / bound.clamp(min=FLOOR)).amax(dim=0))
        probability = torch.maximum(probability, found.amax(dim=0))
    return Excess(share / max(1, len(logits)), ratio, probability)
