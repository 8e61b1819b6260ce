"""Hold the result of a solve."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class SparseCodes:
    """Sparse codes of B targets with at most k atoms each, on the CPU.

    Attributes:
        indices: int64 (B, k), the supports: atoms in the order of selection, -1 in unused slots.
        coefficients: float32 (B, k), 0 in unused slots.
        relative_residuals: float32 (B,), ‖x - x̂‖ / ‖x‖; 0 for a zero target.

    Example:
        >>> import torch
        >>> from mergekit_omp import SparseCodes
        >>> codes = SparseCodes(torch.tensor([[1, -1]]), torch.tensor([[2.0, 0.0]]), torch.tensor([0.1]))
        >>> codes.apply(torch.tensor([[1.0, 1.0], [3.0, 4.0]])).tolist()  # rows of the same anchors in another space
        [[6.0, 8.0]]
    """

    indices: Tensor
    coefficients: Tensor
    relative_residuals: Tensor

    def apply(self, rows: Tensor, chunk_bytes: int = 256 * 2**20) -> Tensor:
        """Apply the codes to other rows: compute Σᵢ cᵢ rows[idxᵢ] for each target.

        Args:
            rows: (N, D) of any floating dtype, one row per atom, in the order of the atoms.
            chunk_bytes: upper bound on the size of float32 copies of ``rows``, in bytes.

        Returns:
            float32 (B, D) on the device of ``rows``.
        """
        combined = torch.empty(len(self.indices), rows.shape[1], dtype=torch.float32, device=rows.device)
        indices, coefficients = self.indices.clamp(min=0).to(rows.device), self.coefficients.to(rows.device)
        step = max(1, chunk_bytes // (4 * max(1, len(rows))))
        for start in range(0, rows.shape[1], step):
            part = slice(start, start + step)
            columns = rows[:, part].float().contiguous()
            combined[:, part] = embedding_bag(indices, columns, per_sample_weights=coefficients, mode="sum")
        return combined


def concatenate(parts: Sequence[SparseCodes]) -> SparseCodes:
    """Concatenate codes in the order of the parts."""
    return SparseCodes(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.coefficients for part in parts]),
        torch.cat([part.relative_residuals for part in parts]),
    )
