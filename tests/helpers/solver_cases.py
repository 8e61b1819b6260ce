"""Create rows for solver tests, and read codes."""

from pathlib import Path

import torch
from safetensors import safe_open

from mergekit_omp.solver import SparseCodes


def random_rows(count: int, dim: int, seed: int, common: float = 0.0) -> torch.Tensor:
    """Draw Gaussian rows of different norms; with ``common`` they share a direction, as embeddings do."""
    draw = torch.Generator().manual_seed(seed)
    lengths = 0.5 + 2 * torch.rand(count, 1, generator=draw)
    return lengths * (torch.randn(count, dim, generator=draw) + common * torch.randn(dim, generator=draw))


def embedding(folder: Path) -> torch.Tensor:
    """Read the input embedding of a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            if "model.embed_tokens.weight" in weights.keys():  # noqa: SIM118
                return weights.get_tensor("model.embed_tokens.weight")
    raise AssertionError(f"no embedding in {folder}")


def supports(codes: SparseCodes) -> list[list[int]]:
    """Return the atoms of each target in the order of selection."""
    return [[atom for atom in row if atom >= 0] for row in codes.indices.tolist()]
