"""The result of a solve."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class SparseCodes:
    """B targets as combinations of at most k atoms each, on the CPU.

    Attributes:
        indices: int64 (B, k), atom of each slot in the order of selection; -1 where the slot is unused.
        coefficients: float32 (B, k), 0 where the slot is unused.
        relative_residuals: float32 (B,), ‖x - x̂‖ / ‖x‖; 0 for a zero target.

    Example:
        >>> codes = SparseCodes(torch.tensor([[1, -1]]), torch.tensor([[2.0, 0.0]]), torch.tensor([0.1]))
        >>> codes.apply(torch.tensor([[1.0, 1.0], [3.0, 4.0]])).tolist()  # in another space, with the same anchors
        [[6.0, 8.0]]
    """

    indices: Tensor
    coefficients: Tensor
    relative_residuals: Tensor

    def apply(self, rows: Tensor, chunk_bytes: int = 256 * 2**20) -> Tensor:
        """Combine other rows with these codes: Σᵢ cᵢ rows[idxᵢ] for each target.

        Args:
            rows: (N, D) of any floating dtype, one row for each atom, in the atoms' order.
            chunk_bytes: bound on the float32 copies of ``rows`` that are held at a time.

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
    """Join the codes of all parts, in order."""
    return SparseCodes(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.coefficients for part in parts]),
        torch.cat([part.relative_residuals for part in parts]),
    )
