"""One step of the pursuit: screen all atoms, rescore the best, take the winner."""

import torch
from torch import Tensor

from mergekit_omp.solver.pursuit import ZERO, Pursuit, decide
from mergekit_omp.solver.screen import FIRST, MORE, Screen, largest, score_exactly


def step(pursuit: Pursuit, screen: Screen, keep: int = FIRST) -> tuple[Tensor, Tensor]:
    """Add one atom to every target that is not done.

    Returns:
        The screen's estimates (B, N) at the residuals before the step, and the ``keep`` atoms (B, keep) with the
        highest possible scores, best first.
    """
    residual = pursuit.residual
    estimates = screen.scores(residual)
    reach = screen.reach(residual, residual.to(estimates.dtype).float())
    ceiling = screen.ceiling(estimates, reach)
    values, order = largest(ceiling, min(max(keep, FIRST + 1), len(screen.norms)))
    exact = score_exactly(pursuit.atoms, order[:, :FIRST], residual[:, None]).squeeze(1)
    choice, best = decide(pursuit, order[:, :FIRST], exact)
    unsure = (_hidden(values, FIRST, screen) >= best) & ~pursuit.done
    rows = unsure.nonzero().flatten()
    if len(rows):
        choice[rows], best[rows] = _look_again(pursuit, screen, rows, ceiling[rows])

    weak = best <= ZERO * pursuit.norm * screen.norms[choice]
    went = pursuit.extend(choice, ~weak)
    # Nothing is left that helps: the best atom is orthogonal to the residual, or in the support's span already.
    pursuit.done |= ~went
    return estimates, order[:, :keep]


def _hidden(values: Tensor, shown: int, screen: Screen) -> Tensor:
    """The highest score (B,) that an atom after the first ``shown`` can have; ``values`` (B, m) are ceilings."""
    if shown >= len(screen.norms):
        return torch.full_like(values[:, 0], -1)
    return values[:, min(shown, values.shape[1] - 1)].float() * (1 + 1.5 * screen.spacing)


def _look_again(pursuit: Pursuit, screen: Screen, rows: Tensor, ceiling: Tensor) -> tuple[Tensor, Tensor]:
    """Decide for targets whose best atom may be hidden after the first few: with more candidates, then with all."""
    part = pursuit.view(rows)
    values, order = largest(ceiling, min(MORE + 1, len(screen.norms)))
    exact = score_exactly(part.atoms, order, part.residual[:, None]).squeeze(1)
    choice, best = decide(part, order, exact)
    still = (_hidden(values, MORE, screen) >= best).nonzero().flatten()
    for some in still.split(64):
        last = part.view(some)
        exact, order = largest((last.residual @ last.atoms.T).abs(), min(MORE, len(screen.norms)))
        choice[some], best[some] = decide(last, order, exact)
    return choice, best
