"""Approximate rows by sparse combinations of other rows with Orthogonal Matching Pursuit (OMP), on plain tensors.

Reading order: ``api`` (checks, devices), ``device`` and ``dispatch`` (choice of the method), then ``scan.search`` and
``gram.search``. ``reference`` is the definition that both have to match. Nothing here knows of tokens or mergekit.
"""

from mergekit_omp.solver.api import not_finite, solve_omp
from mergekit_omp.solver.codes import SparseCodes

__all__ = ["SparseCodes", "not_finite", "solve_omp"]
