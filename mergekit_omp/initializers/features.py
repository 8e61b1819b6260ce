"""Compute the features of tokens that rows are predicted from, in blocks where many tokens have the same features.

Nearly all of the 39,000 anchors of a real pair have two pieces: 16,000 different first ones, and 3,000 different last
ones. Products with a block take the different rows alone: what belongs to equal ones is summed before, or copied
after.

Letters in shapes: T tokens, R rows of the base, d donor's width, D base's width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS_PER_BATCH = 1024
"""Tokens per batch: features of a complete vocabulary would take several times the memory of its rows. Batches four
times as large take a tenth longer, since the system clears the memory of large blocks again for each one."""


@dataclass(frozen=True)
class Group:
    """Tokens of one block with their different features.

    Attributes:
        tokens: int64 (t,), indices among the T tokens.
        rows: float64 (u, width), the different features.
        place: int64 (t,), index of each token's features in ``rows``.
        counts: int64 (u,), number of tokens that have each of ``rows``.
    """

    tokens: Tensor
    rows: Tensor
    place: Tensor
    counts: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Sum values (t, …) over the tokens of each of ``rows``: (u, …)."""
        if len(self.rows) == len(values):  # each of its own
            return values
        return values.new_zeros(len(self.rows), *values.shape[1:]).index_add_(0, self.place, values)


@dataclass(frozen=True)
class Block:
    """A part of the features of T tokens.

    Attributes:
        width: number of features.
        key: int64 (T,), equal for tokens with equal features; -1 for tokens whose features are 0.
        rows: function from indices int64 (t,) of tokens to their features float64 (t, width).
    """

    width: int
    key: Tensor
    rows: Callable[[Tensor], Tensor]

    def groups(self) -> Iterator[Group]:
        """Yield the tokens whose features are not 0 in batches, those with equal features together."""
        order = self.key.argsort(stable=True)
        for tokens in order[self.key[order] >= 0].split(TOKENS_PER_BATCH):
            _, place, counts = torch.unique_consecutive(self.key[tokens], return_inverse=True, return_counts=True)
            yield Group(tokens, self.rows(tokens[counts.cumsum(0) - counts]), place, counts)


def donor_block(rows: Tensor, bias: float) -> Block:
    """Return the block float64 (T, d + 1) of the donor's rows (T, d) and a constant."""

    def with_constant(tokens: Tensor) -> Tensor:
        features = torch.full((len(tokens), rows.shape[1] + 1), bias, dtype=torch.float64, device=rows.device)
        features[:, :-1] = rows[tokens]
        return features

    return Block(rows.shape[1] + 1, torch.arange(len(rows), device=rows.device), with_constant)


def piece_blocks(
    pieces: Sequence[Sequence[int]], base: Tensor, fallback: Tensor, scale: float
) -> tuple[Block, Block, Block]:
    """Return the blocks float64 (T, D) of each token's first piece, its last piece, and what those between change.

    The third is the mean of all pieces less the mean of first and last: 0 for tokens of up to two pieces.

    Args:
        pieces: rows of the pieces of T tokens in ``base``, in the order of the text; may be empty.
        base: (R, D) of a floating dtype; not modified.
        fallback: (D,), the only piece of tokens without pieces.
        scale: factor of all features.
    """
    width = base.shape[1]
    lengths = torch.tensor([len(rows) for rows in pieces], dtype=torch.int64)
    flat = torch.tensor([row for rows in pieces for row in rows], dtype=torch.int64)
    ends = lengths.cumsum(0)
    first, last = (torch.full_like(lengths, len(base)) for _ in range(2))
    present = lengths > 0
    first[present], last[present] = flat[(ends - lengths)[present]], flat[ends[present] - 1]
    first, last, lengths, ends, flat = (ids.to(base.device) for ids in (first, last, lengths, ends, flat))

    def lookup(ids: Tensor) -> Tensor:
        rows = base[ids.clamp(max=len(base) - 1)].double()
        rows[ids == len(base)] = fallback.to(rows)
        return rows.mul_(scale)

    def between(tokens: Tensor) -> Tensor:
        counts = lengths[tokens]
        owner = torch.repeat_interleave(torch.arange(len(tokens), device=base.device), counts)
        place = torch.arange(len(owner), device=base.device) + (ends[tokens] - counts.cumsum(0))[owner]
        ends_alone = (lookup(first[tokens]) + lookup(last[tokens])) / 2
        return torch.zeros_like(ends_alone).index_add_(0, owner, lookup(flat[place])) / counts[:, None] - ends_alone

    many = torch.where(lengths > 2, torch.arange(len(lengths), device=base.device), -1)
    return (
        Block(width, first, lambda tokens: lookup(first[tokens])),
        Block(width, last, lambda tokens: lookup(last[tokens])),
        Block(width, many, between),
    )
