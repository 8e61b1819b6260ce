"""Implement Orthogonal Matching Pursuit by its definition, as the reference for the fast methods."""

import numpy as np
import torch
from torch import Tensor

from mergekit_omp.solver.codes import SparseCodes
from mergekit_omp.solver.tolerances import TIE, ZERO


def reference_omp(targets: Tensor, atoms: Tensor, k: int, *, normalize_atoms: bool = False) -> SparseCodes:
    """Solve in float64, one target at a time, with a new least-squares fit in every step.

    Source: Pati, Rezaiifar & Krishnaprasad (1993). The arguments are those of :func:`mergekit_omp.solver.solve_omp`.
    """
    x, a = targets.cpu().double().numpy(), atoms.cpu().double().numpy()
    norms = np.linalg.norm(a, axis=1)
    weights = 1 / np.where(norms > 0, norms, 1) if normalize_atoms else np.ones(len(a))
    indices = np.full((len(x), min(k, len(a))), -1)
    coefficients, relative_residuals = np.zeros(indices.shape), np.zeros(len(x))
    for row, target in enumerate(x):
        residual, support = target, indices[row]
        for size in range(len(support)):
            correlations = np.abs(a @ residual) * weights
            best = np.flatnonzero(correlations >= correlations.max() * (1 - TIE))[0]
            if correlations[best] <= ZERO * np.linalg.norm(target) * norms[best] * weights[best]:
                break  # the residual is zero, or orthogonal to all atoms
            support[size] = best
            chosen = a[support[: size + 1]]  # (size + 1, d)
            fit = np.linalg.lstsq(chosen.T, target, rcond=None)[0]
            coefficients[row, : size + 1] = fit
            residual = target - fit @ chosen
        relative_residuals[row] = np.linalg.norm(residual) / (np.linalg.norm(target) or 1)
    codes = torch.from_numpy(indices), torch.from_numpy(coefficients), torch.from_numpy(relative_residuals)
    return SparseCodes(codes[0], codes[1].float(), codes[2].float())
