"""Sparse codes of rows over other rows by Orthogonal Matching Pursuit; knows nothing of tokens or of mergekit."""

from mergekit_omp.solver.api import not_finite, solve_omp
from mergekit_omp.solver.codes import SparseCodes

__all__ = ["SparseCodes", "not_finite", "solve_omp"]
