"""Sparse codes of rows over other rows by Orthogonal Matching Pursuit; knows nothing of tokens or of mergekit."""

from mergekit_omp.solver.codes import SparseCodes
from mergekit_omp.solver.omp import not_finite, solve_omp

__all__ = ["SparseCodes", "not_finite", "solve_omp"]
