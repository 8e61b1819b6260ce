"""Decide between the atoms that the error bound of a scan leaves open, in float64.

Letters in shapes: d dimensions, n steps of a draft.
"""

from mergekit_omp.solver.gram.candidates import beats, exact_correlation
from mergekit_omp.solver.gram.cholesky import fit_target
from mergekit_omp.solver.gram.kernels import compiled
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.gram.state import Pursuits
from mergekit_omp.solver.gram.workspace import Workspace, fit_of


@compiled
def add_rival(gram: Gram, pursuits: Pursuits, slot: int, step: int, atom: int, work: Workspace) -> None:
    """List an atom that may be better than the choice of a step; decide on a full list first."""
    if pursuits.rivals[slot] == pursuits.rival_atoms.shape[1]:
        compare_rivals(gram, pursuits, slot, work)
    place = pursuits.rivals[slot]
    pursuits.rival_atoms[slot, place], pursuits.rival_steps[slot, place] = atom, step
    pursuits.rivals[slot] += 1


@compiled
def compare_rivals(gram: Gram, pursuits: Pursuits, slot: int, work: Workspace) -> None:
    """Replace choices of a draft by better rivals, and empty the list of rivals.

    The residuals (n, d) of the workspace that are marked as known must be those of this draft.
    """
    for place in range(pursuits.rivals[slot]):
        atom, step = pursuits.rival_atoms[slot, place], pursuits.rival_steps[slot, place]
        residual = work.residuals[step]
        if not work.known[step]:
            size = pursuits.verified[slot] + step
            fit_target(fit_of(gram, pursuits, slot, work), pursuits.targets[slot], size, residual)
            work.known[step] = True
        correlation = exact_correlation(gram, atom, residual)
        if beats(correlation, atom, pursuits.correlations[slot, step], pursuits.choices[slot, step]):
            pursuits.correlations[slot, step], pursuits.choices[slot, step] = correlation, atom
    pursuits.rivals[slot] = 0
