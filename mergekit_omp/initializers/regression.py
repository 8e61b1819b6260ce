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

In the computation, the mean's place is taken by its difference z to (first + last) / 2, which is 0 for nearly all
tokens. With V the coefficients of the features so written, W is V but for the coefficients of the first and the last
row, from which half of V's for z is subtracted. The ridge λ ‖W‖² stays as it is, and is written in V.

Letters in shapes: B targets, N anchors, R rows of the base, d donor's width, D base's width, F = d + 3 D + 1 features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from mergekit_omp.initializers.features import TOKENS_PER_BATCH, Block, donor_block, piece_blocks
from mergekit_omp.solver import SparseCodes
from mergekit_omp.vocabulary.segmentation import spell

RIDGE = 0.01
"""Regularisation relative to the mean diagonal of φᵀφ. 0.1 is worse; 0.001 is no better on held-out anchors."""

CORRECTION = 0.5
"""Share of OMP's correction. About 0.3 predicts rows of held-out anchors best; 0.5 gives fewer bits per byte."""


@dataclass(frozen=True)
class RowRegression:
    """A fitted regression that predicts base rows of new tokens; created by :meth:`fit`.

    Attributes:
        base: (R, D) of a floating dtype, the base's matrix; not modified.
        weights: float32 (F, D), coefficients V of the donor's row and a constant, the first piece, the last, and z.
        residuals: float32 (N, D), residuals of the anchors' rows.
        fallback: float32 (D,), the piece of a token without pieces: the mean of the anchors' rows.
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
    ) -> "RowRegression":
        """Fit the anchors' base rows, with normal equations in float64 and residuals in float32.

        Args:
            anchors: (N, d) of any floating dtype, the donor's rows of the anchors; not modified.
            base: (R, D) of any floating dtype, the base's matrix; not modified.
            base_ids: int64 (N,), row of each anchor in ``base``.
            pieces: rows of the pieces of each anchor in ``base``, from :func:`pieces_of_anchors`.

        Returns:
            The fitted regression.
        """
        rows = base[base_ids].to(torch.float32, copy=True)  # (N, D)
        norm = anchors.float().norm(dim=1).mean().item()
        scale = norm / rows.norm(dim=1).mean().item()
        unfitted = cls(base, rows[:0], rows[:0], rows.mean(dim=0), scale, norm)
        blocks = unfitted._blocks(anchors, pieces)
        fitted = replace(unfitted, weights=_solve(*_normal_equations(blocks, rows), blocks), residuals=rows)
        for tokens, predicted in fitted._predictions(blocks):
            rows.index_add_(0, tokens, predicted, alpha=-1)
        return fitted

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
        for tokens, predicted in self._predictions(self._blocks(targets, pieces)):
            rows.index_add_(0, tokens, predicted)
        return rows

    def _blocks(self, rows: Tensor, pieces: Sequence[Sequence[int]]) -> list[Block]:
        """Return the blocks of the features of T tokens, given the donor's rows (T, d) and the pieces."""
        return [donor_block(rows, self.bias), *piece_blocks(pieces, self.base, self.fallback, self.scale)]

    def _predictions(self, blocks: Sequence[Block]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens int64 (t,) and what one block adds to their rows, float32 (t, D)."""
        for block, weights in zip(blocks, self.weights.split([block.width for block in blocks]), strict=True):
            for group in block.groups():
                yield group.tokens, (group.rows.float() @ weights)[group.place]


def _normal_equations(blocks: Sequence[Block], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return φᵀφ (F, F), of which only the lower triangle is defined, and φᵀb (F, D) for rows b (N, D), in float64."""
    width = sum(block.width for block in blocks)
    # Column by column, as LAPACK needs them to work in place.
    gram, right = (rows.new_zeros(columns, width, dtype=torch.float64).mT for columns in (width, rows.shape[1]))
    parts = _parts(blocks)
    for number, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        for group in block.groups():
            for other, columns in zip(blocks[:number], parts[:number], strict=True):
                gram[part, columns].addmm_(group.rows.T, group.sums(other.rows(group.tokens)))
            right[part].addmm_(group.rows.T, group.sums(rows[group.tokens].double()))
            _add_lower_products(gram[part, part], group.rows * group.counts[:, None].sqrt())
    return gram, right


def _solve(gram: Tensor, right: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Return the coefficients V float32 (F, D); ``gram`` and ``right`` are overwritten.

    With M = z + (first + last) / 2, the features' mean, the diagonal of φᵀφ has that of MᵀM, and ‖W‖² is
    ‖V‖² + ½ ‖V of z‖² - ⟨V of z, V of first + V of last⟩.
    """
    _, first, last, between = _parts(blocks)
    diagonal = gram.diagonal()
    of_means = gram[between, first].diagonal() + gram[between, last].diagonal()
    of_means = of_means + (diagonal[first] + diagonal[last]) / 4 + gram[last, first].diagonal() / 2
    penalty = RIDGE * (diagonal.sum() + of_means.sum()) / len(gram)
    diagonal.add_(penalty)
    gram[between, between].diagonal().add_(penalty / 2)
    for ends in (first, last):
        gram[between, ends].diagonal().sub_(penalty / 2)
    # Copies of these matrices would be the peak of a run: 3 GB each for a base and a donor of 5,000 columns.
    failed = torch.empty(0, dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(gram, check_errors=True, out=(gram, failed))
    torch.linalg.solve_triangular(gram, right, upper=False, out=right)
    torch.linalg.solve_triangular(gram.mT, right, upper=True, out=right)
    return right.float()


def _parts(blocks: Sequence[Block]) -> list[slice]:
    """Return the columns of each block in φ."""
    ends = list(accumulate(block.width for block in blocks))
    return [slice(end - block.width, end) for block, end in zip(blocks, ends, strict=True)]


def _add_lower_products(gram: Tensor, rows: Tensor, blocks: int = 8) -> None:
    """Add the lower triangle of rowsᵀ rows, for rows (T, F), to ``gram`` (F, F); the part above is undefined."""
    for columns in torch.arange(rows.shape[1]).tensor_split(blocks):
        if len(columns):
            part, end = slice(int(columns[0]), int(columns[-1]) + 1), int(columns[-1]) + 1
            gram[part, :end].addmm_(rows[:, part].T, rows[:, :end])


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

    These are the anchors' base rows, the normal equations in float64, which are solved in place, their solution in
    float32, and for a batch the features of two blocks, their sums and what they are made from.
    """
    width = donor_width + 3 * base_width + 1
    equations = width * (8 * width + 12 * base_width)
    batch = 8 * 6 * max(donor_width + 1, base_width) * min(anchors, TOKENS_PER_BATCH)
    return 4 * anchors * base_width + equations + batch
