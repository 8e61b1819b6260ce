"""Write rows as sparse combinations of other rows by Orthogonal Matching Pursuit; knows nothing of tokens or mergekit.

Read from ``api`` (checks, devices) over ``device`` and ``dispatch`` (which method) to ``scan.search`` and
``gram.search``; ``reference`` is the definition that both have to match.
"""

from mergekit_omp.solver.api import not_finite, solve_omp
from mergekit_omp.solver.codes import SparseCodes

__all__ = ["SparseCodes", "not_finite", "solve_omp"]
