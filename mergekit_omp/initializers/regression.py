"""Rows predicted from the donor's row and from the base's own pieces of a token, corrected by OMP's codes.

OMP finds a token's neighbours in the donor's space and trusts that the base arranges them alike. Its base rows are as
sharp as rows are, and as far off as the two spaces differ. A linear map that is fitted on all anchors is the opposite:
right on average, and blind to what is peculiar to a token. This is one plus half of the other:

    row(t) = φ(t) W + s · Σᵢ cᵢ (bᵢ - φ(aᵢ) W)

with W the ridge regression of the anchors' base rows b on their features φ, c the OMP codes of t over the anchors a,
and s the share of OMP's correction. With s = 1 and φ the donor's row alone this is OMP whose residual is mapped into
the base's space; with s = 0 it is the regression. φ is the donor's row, then the mean, the first and the last base row
of the pieces that the base's tokenizer makes of the token. Anchors are whole tokens of the base: their pieces are what
the base would make of them without the token itself.

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
"""Regularisation, as a share of the mean diagonal of φᵀφ. 0.1 is worse; 0.001 predicts held-out anchors no better."""

CORRECTION = 0.5
"""Share of OMP's correction. About 0.3 predicts held-out anchors' rows best; 0.5 gives the text fewer bits."""


_TOKENS_AT_A_TIME = 4096
"""Features are several times as wide as rows, so that those of a whole vocabulary would be many times its size."""


@dataclass(frozen=True)
class RowRegression:
    """The fit, ready to predict base rows of any number of new tokens. Made by ``fit``.

    Attributes:
        base: [R, D] floating point, the base's matrix; borrowed.
        weights: float32 [F, D], the regression.
        surprise: float32 [N, D], what the regression leaves of each anchor's row.
        fallback: float32 [D], stands for the pieces of a token that has none: the mean of the anchors' rows.
        scale: puts base rows on the donor's scale, so that one ridge suits all features.
        bias: the constant feature, of the size of the others.
    """

    base: Tensor
    weights: Tensor
    surprise: Tensor
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
        """Fit the anchors' base rows. Products are float32, the normal equations are solved in float64.

        Args:
            anchors: [N, d] of any floating dtype, the donor's rows of the anchors; borrowed.
            base: [R, D] of any floating dtype, the base's whole matrix; borrowed.
            base_ids: int64 [N], the row of ``base`` of each anchor.
            pieces: for each anchor rows of ``base``, without its own: ``pieces_of_anchors``.
            ridge: regularisation, above 0, as a share of the mean diagonal of φᵀφ.

        Raises:
            OmpError: ``ridge`` is not above 0.
        """
        if ridge <= 0:
            raise OmpError(f"The ridge is {ridge}, but the regression needs a number above 0: write 0.01.")
        rows = base[base_ids].to(torch.float32, copy=True)  # [N, D]
        norm = anchors.float().norm(dim=1).mean().item()
        scale = norm / rows.norm(dim=1).mean().item()
        empty = cls(base, rows[:0], rows[:0], rows.mean(dim=0), scale, norm)
        # φᵀφ [F, F], its upper triangle, and φᵀb [F, D], summed in float64
        gram = right = torch.zeros((), dtype=torch.float64)
        for part in _parts(len(rows)):
            known = empty.features(anchors[part], pieces[part])
            gram = gram + _upper_products(known).double()
            right = right + (known.T @ rows[part]).double()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weights = torch.cholesky_solve(right, torch.linalg.cholesky(gram, upper=True), upper=True).float()
        for part in _parts(len(rows)):
            rows[part] -= empty.features(anchors[part], pieces[part]) @ weights
        return replace(empty, weights=weights, surprise=rows)

    def predict(
        self, targets: Tensor, pieces: Sequence[Sequence[int]], codes: SparseCodes, correction: float = CORRECTION
    ) -> Tensor:
        """Predict the base's rows of tokens that it lacks.

        Args:
            targets: [B, d] of any floating dtype, the donor's rows of the new tokens; borrowed.
            pieces: for each target rows of ``base``, as the base's tokenizer splits the token.
            codes: OMP's codes of the B targets over the N anchors.
            correction: share of OMP's correction; 0 is the regression alone.

        Returns:
            float32 [B, D].
        """
        rows = codes.apply(self.surprise) * correction
        for part in _parts(len(targets)):
            rows[part] += self.features(targets[part], pieces[part]) @ self.weights
        return rows

    def features(self, rows: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
        """φ of T tokens, float32 [T, F]: the donor's rows [T, d]; mean, first and last base row of the pieces; 1."""
        parts = (part * self.scale for part in piece_rows(pieces, self.base, self.fallback))
        return torch.cat([rows.float(), *parts, rows.new_full((len(rows), 1), self.bias, dtype=torch.float32)], dim=1)


def piece_rows(pieces: Sequence[Sequence[int]], base: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, first and last row of each token's pieces: float32 [T, D] each.

    Args:
        pieces: for each of T tokens, rows of ``base`` in the order of the text; may be empty.
        base: [R, D] floating point; borrowed.
        fallback: [D], for tokens without pieces.
    """
    counts = torch.tensor([len(each) for each in pieces], dtype=torch.int64, device=base.device)
    flat = torch.tensor([row for each in pieces for row in each], dtype=torch.int64, device=base.device)
    owner = torch.repeat_interleave(torch.arange(len(pieces), device=base.device), counts)
    mean, first, last = (fallback.to(base.device).float().repeat(len(pieces), 1) for _ in range(3))
    some = counts > 0
    sums = torch.zeros_like(mean).index_add_(0, owner, base[flat].float())
    mean[some] = sums[some] / counts[some, None]
    ends = counts.cumsum(0)[some]
    first[some] = base[flat[ends - counts[some]]].float()
    last[some] = base[flat[ends - 1]].float()
    return mean, first, last


def pieces_of_anchors(tokens: Sequence[bytes], rows_of: Mapping[bytes, int]) -> list[list[int]]:
    """Split tokens that the base has into others of its tokens, the longest first, from left to right.

    Args:
        tokens: the bytes of each anchor.
        rows_of: the base's row for each byte string that it has a token for.

    Returns:
        For each anchor its rows; an empty list where the base has no other way to write it, such as a single byte.
    """
    longest = max(map(len, rows_of), default=0)
    return [spell(token, rows_of, min(longest, len(token) - 1)) for token in tokens]


def _upper_products(rows: Tensor, blocks: int = 8) -> Tensor:
    """The upper triangle of rowsᵀ rows [F, F], of rows [T, F]; what is below counts for nothing."""
    size = rows.shape[1]
    products = rows.new_zeros(size, size)
    for columns in torch.arange(size).tensor_split(blocks):
        if len(columns):
            part, end = slice(int(columns[0]), int(columns[-1]) + 1), int(columns[-1]) + 1
            products[:end, part] = rows[:, :end].T @ rows[:, part]
    return products


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, _TOKENS_AT_A_TIME):
        yield slice(start, start + _TOKENS_AT_A_TIME)
