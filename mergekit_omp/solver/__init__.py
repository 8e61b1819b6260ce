"""Sparse codes of rows over other rows by Orthogonal Matching Pursuit; knows nothing of tokens or of mergekit."""

from mergekit_omp.solver.codes import SparseCodes
from mergekit_omp.solver.omp import solve_omp

__all__ = ["SparseCodes", "solve_omp"]
