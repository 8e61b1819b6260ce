"""Predict rows by ridge regression on the donor's row and the pieces of a token, corrected by sparse codes.

OMP finds a token's neighbours in the donor's space and assumes the same geometry in the base. Its rows have the
variance of real rows, and errors where the two spaces differ. A linear map that is fitted on all anchors has the
opposite properties: it is right on average, but misses what is specific to a token. The prediction is one plus half of
the other:

    row(t) = φ(t) W + s · Σᵢ cᵢ (bᵢ - φ(aᵢ) W)

with W the ridge regression of the anchors' base rows b on their features φ, c the sparse code of t over the anchors a,
and s the share of OMP's correction. With s = 1 and only the donor's row in φ, this is OMP whose residual is mapped to
the base's space; with s = 0 it is the regression. φ consists of the donor's row and of the mean, first and last base
row of the pieces of the token in the base's tokenizer. An anchor is a single token of the base; its pieces are its
segmentation without that token.

Letters in shapes: B targets, N anchors, R rows of the base, d donor's width, D base's width, F = d + 3 D + 1 features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_omp.errors import OmpError
from mergekit_omp.solver import SparseCodes
from mergekit_omp.vocabulary.segmentation import spell

RIDGE = 0.01
"""Regularisation relative to the mean diagonal of φᵀφ. 0.1 is worse; 0.001 is no better on held-out anchors."""

CORRECTION = 0.5
"""Share of OMP's correction. About 0.3 predicts rows of held-out anchors best; 0.5 gives fewer bits per byte."""

_TOKENS_PER_BATCH = 4096
"""Tokens per batch: features are several times wider than rows, too large for a complete vocabulary."""


@dataclass(frozen=True)
class RowRegression:
    """A fitted regression that predicts base rows of new tokens; created by :meth:`fit`.

    Attributes:
        base: (R, D) of a floating dtype, the base's matrix; not modified.
        weights: float32 (F, D), coefficients W of the regression.
        residuals: float32 (N, D), residuals of the anchors' rows.
        fallback: float32 (D,), features of a token without pieces: the mean of the anchors' rows.
        scale: factor that brings base rows to the scale of the donor, so that one ridge fits all features.
        bias: value of the constant feature, of the scale of the others.
    """

    base: Tensor
    weights: Tensor
    residuals: Tensor
    fallback: Tensor
    scale: float
    bias: float

    @classmethod
    def fit(
        cls,
        anchors: Tensor,
        base: Tensor,
        base_ids: Tensor,
        pieces: Sequence[Sequence[int]],
        ridge: float = RIDGE,
    ) -> "RowRegression":
        """Fit the anchors' base rows, with products in float32 and normal equations in float64.

        Args:
            anchors: (N, d) of any floating dtype, the donor's rows of the anchors; not modified.
            base: (R, D) of any floating dtype, the base's matrix; not modified.
            base_ids: int64 (N,), row of each anchor in ``base``.
            pieces: rows of the pieces of each anchor in ``base``, from :func:`pieces_of_anchors`.
            ridge: positive regularisation, relative to the mean diagonal of φᵀφ.

        Returns:
            The fitted regression.

        Raises:
            OmpError: if ``ridge`` is not positive.
        """
        if ridge <= 0:
            raise OmpError(f"The ridge is {ridge}, but the regression needs a positive number: write 0.01.")
        rows = base[base_ids].to(torch.float32, copy=True)  # (N, D)
        norm = anchors.float().norm(dim=1).mean().item()
        scale = norm / rows.norm(dim=1).mean().item()
        empty = cls(base, rows[:0], rows[:0], rows.mean(dim=0), scale, norm)
        # upper triangle of φᵀφ (F, F), and φᵀb (F, D), summed in float64
        width = anchors.shape[1] + 3 * rows.shape[1] + 1
        gram, right = (rows.new_zeros(width, columns, dtype=torch.float64) for columns in (width, rows.shape[1]))
        for part in _parts(len(rows)):
            features = empty.features(anchors[part], pieces[part])
            _add_upper_products(gram, features)
            right += (features.T @ rows[part]).double()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weights = torch.cholesky_solve(right, torch.linalg.cholesky(gram, upper=True), upper=True).float()
        for part in _parts(len(rows)):
            rows[part] -= empty.features(anchors[part], pieces[part]) @ weights
        return replace(empty, weights=weights, residuals=rows)

    def predict(
        self, targets: Tensor, pieces: Sequence[Sequence[int]], codes: SparseCodes, correction: float = CORRECTION
    ) -> Tensor:
        """Predict the base's rows of new tokens.

        Args:
            targets: (B, d) of any floating dtype, the donor's rows of the new tokens; not modified.
            pieces: rows of the pieces of each target in ``base``, as the base's tokenizer segments it.
            codes: sparse codes of the B targets over the N anchors.
            correction: share of OMP's correction; 0 is the regression without it.

        Returns:
            The rows float32 (B, D).
        """
        rows = codes.apply(self.residuals) * correction
        for part in _parts(len(targets)):
            rows[part] += self.features(targets[part], pieces[part]) @ self.weights
        return rows

    def features(self, rows: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Return φ float32 (T, F): the donor's rows (T, d); mean, first and last base row of pieces; a constant."""
        parts = (part * self.scale for part in piece_rows(pieces, self.base, self.fallback))
        return torch.cat([rows.float(), *parts, rows.new_full((len(rows), 1), self.bias, dtype=torch.float32)], dim=1)


def piece_rows(pieces: Sequence[Sequence[int]], base: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, first and last row of each token's pieces: float32 (T, D) each.

    Args:
        pieces: rows of the pieces of T tokens in ``base``, in the order of the text; may be empty.
        base: (R, D) of a floating dtype; not modified.
        fallback: (D,), the row for tokens without pieces.
    """
    counts = torch.tensor([len(rows) for rows in pieces], dtype=torch.int64, device=base.device)
    flat = torch.tensor([row for rows in pieces for row in rows], dtype=torch.int64, device=base.device)
    owner = torch.repeat_interleave(torch.arange(len(pieces), device=base.device), counts)
    mean, first, last = (fallback.to(base.device).float().repeat(len(pieces), 1) for _ in range(3))
    present = counts > 0
    sums = torch.zeros_like(mean).index_add_(0, owner, base[flat].float())
    mean[present] = sums[present] / counts[present, None]
    ends = counts.cumsum(0)[present]
    first[present] = base[flat[ends - counts[present]]].float()
    last[present] = base[flat[ends - 1]].float()
    return mean, first, last


def pieces_of_anchors(tokens: Sequence[bytes], rows_of: Mapping[bytes, int]) -> list[list[int]]:
    """Segment anchors greedily into the longest other tokens of the base, from left to right.

    Args:
        tokens: bytes of each anchor.
        rows_of: the base's row for the bytes of each of its tokens.

    Returns:
        Rows of the pieces of each anchor; empty if there is no other segmentation, as for a single byte.
    """
    longest = max(map(len, rows_of), default=0)
    return [spell(token, rows_of, min(longest, len(token) - 1)) for token in tokens]


def memory_of_regression(anchors: int, donor_width: int, base_width: int) -> int:
    """Return the bytes that :meth:`RowRegression.fit` needs beside its arguments.

    These are the anchors' base rows, the normal equations in float64 with their factor, and the features of a batch
    with the rows that they are made from.
    """
    width = donor_width + 3 * base_width + 1
    equations = 8 * 2 * width * (width + base_width)
    return 4 * anchors * base_width + equations + 4 * 2 * width * min(anchors, _TOKENS_PER_BATCH)


def _add_upper_products(gram: Tensor, rows: Tensor, blocks: int = 8) -> None:
    """Add the upper triangle of rowsᵀ rows, for rows (T, F), to ``gram`` (F, F); the part below is undefined."""
    for columns in torch.arange(rows.shape[1]).tensor_split(blocks):
        if len(columns):
            part, end = slice(int(columns[0]), int(columns[-1]) + 1), int(columns[-1]) + 1
            gram[:end, part] += (rows[:, :end].T @ rows[:, part]).double()


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, _TOKENS_PER_BATCH):
        yield slice(start, start + _TOKENS_PER_BATCH)
