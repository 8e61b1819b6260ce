"""Many steps at a time: pursue on a small pool of atoms, then prove that no other atom would have been chosen.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity, R steps, M pool, m suspects.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.solver.gram import Gram
from mergekit_omp.solver.pursuit import ZERO, Pursuit, decide
from mergekit_omp.solver.screen import Screen, largest, score_exactly

POOL = 384
"""Atoms that the pursuit may choose from before it has to look at all of them again."""

STEPS = 12
"""Steps before all atoms are looked at again; more of them outlive the pool."""

SUSPECTS = 256
"""Atoms that are rescored at all steps; where there are more, the steps are given up."""

RESCORED = 4
"""Atoms of the pool that are rescored in float32 at each step."""


@dataclass
class _Trial:
    """What was done on the pool. Step t of target b is void unless ``valid[b, t]``; valid steps come first."""

    start: Tensor  # int64 (B,), size before
    residuals: Tensor  # (B, R, d), before each step
    choices: Tensor  # int64 (B, R)
    scores: Tensor  # (B, R), of the choices
    noise: Tensor  # (B, R), rounding error of a score with an atom of norm 1
    valid: Tensor  # bool (B, R)


def speculate(
    pursuit: Pursuit, screen: Screen, gram: Gram, origin: Tensor, size: Tensor, estimates: Tensor, pool: Tensor
) -> float:
    """Take up to :data:`STEPS` steps, of which every one that stays is the one that a look at all atoms gives.

    Args:
        pursuit: the state to go on from.
        screen: all atoms, rounded.
        gram: their inner products.
        origin: (B, d), residuals of which ``estimates`` are known.
        size: int64 (B,), the support's size there; at most the present one.
        estimates: (B, N), the screen's scores of ``origin``.
        pool: int64 (B, M), atoms with high scores there.

    Returns:
        The mean number of steps taken.
    """
    # In ascending order, the pool's places in a row of the table are read in the order of memory.
    trial = _pursue_pool(pursuit, gram, origin, size, estimates, pool.sort(dim=1).values)
    suspects, certain = _suspects(pursuit, screen, gram, trial, origin, size, estimates)
    _correct(pursuit, trial, suspects, certain)
    return float((pursuit.size - trial.start).float().mean())


def _pursue_pool(
    pursuit: Pursuit, gram: Gram, origin: Tensor, size: Tensor, estimates: Tensor, pool: Tensor
) -> _Trial:
    count = len(size)
    here = torch.arange(count, device=size.device)
    # Scores change more slowly as the support grows.
    sizes = pursuit.size[~pursuit.done]
    steps = min(STEPS, max(6, int(sizes.float().mean())), pursuit.k - int(sizes.min()))
    inner = torch.zeros(count, pursuit.k, pool.shape[1], device=pool.device)  # G[support, pool]
    width = int(pursuit.size.max())
    inner[:, :width] = gram.entries(pursuit.support[:, :width, None].clamp(min=0), pool[:, None, :])
    scores = estimates.gather(1, pool).float()
    shares = gram.shares[pool]  # (B, M, p)

    def follow(path: Tensor, residual: Tensor) -> None:
        change = pursuit.path[here, pursuit.size] - path
        scores.sub_(torch.bmm(change[:, None], inner).squeeze(1))
        scores.sub_(torch.bmm(shares, ((residual - pursuit.residual) @ gram.directions.T)[:, :, None]).squeeze(2))

    follow(pursuit.path[here, size], origin)
    trial = _Trial(pursuit.size.clone(), *([] for _ in range(5)))
    for _ in range(steps):
        top = scores.abs().topk(min(RESCORED, pool.shape[1]), dim=1, sorted=False).indices
        candidates = pool.gather(1, top)
        exact = score_exactly(pursuit.atoms, candidates, pursuit.residual[:, None]).squeeze(1)
        best, at = exact.max(dim=1)
        choice = candidates.gather(1, at[:, None]).squeeze(1)
        trial.residuals.append(pursuit.residual.clone())
        trial.choices.append(choice)
        trial.scores.append(best)
        trial.noise.append(pursuit.noise())
        before, slot = pursuit.path[here, pursuit.size], pursuit.size.clamp(max=pursuit.k - 1)
        went = pursuit.extend(choice, best > ZERO * pursuit.norm * pursuit.atom_norms[choice])
        trial.valid.append(went)
        if not went.any():
            break
        inner[here[went], slot[went]] = gram.entries(choice[went, None], pool[went])
        follow(before, trial.residuals[-1])
    for field in ("residuals", "choices", "scores", "noise", "valid"):
        setattr(trial, field, torch.stack(getattr(trial, field), dim=1))
    # A target that stopped once goes no further in this trial.
    trial.valid = trial.valid.cumprod(dim=1).bool()
    return trial


def _suspects(
    pursuit: Pursuit, screen: Screen, gram: Gram, trial: _Trial, origin: Tensor, size: Tensor, estimates: Tensor
) -> tuple[Tensor, Tensor]:
    """Atoms (B, m) that may beat a choice at some step, -1 for none; and where that is all of them, bool (B,)."""
    low, half = screen.low.dtype, screen.spacing / 2
    width = int(pursuit.size.max())
    here = torch.arange(len(size), device=size.device)
    support = pursuit.support[:, :width].clamp(min=0)

    # Scores are compared in units of the choice's, so that one maximum over the steps will do.
    scale = (trial.valid / trial.scores.clamp(min=torch.finfo(torch.float32).tiny)).to(low)
    unit = scale.float()[:, :, None]
    moments = (trial.start[:, None] + torch.arange(trial.valid.shape[1], device=size.device)).clamp(max=pursuit.k)
    change = pursuit.path[here[:, None], moments, :width] - pursuit.path[here, size, None, :width]
    moved = unit * (trial.residuals - origin[:, None])  # (B, R, d)
    along = moved @ gram.directions.T  # (B, R, p)
    weights, turns = (-unit * change).to(low), along.to(low)
    extra = torch.arange(gram.count, gram.count + turns.shape[2], device=size.device).expand(len(size), -1)
    peaks = gram.peaks(torch.cat([support, extra], 1), torch.cat([weights, turns], 2), estimates, scale)

    # What was multiplied is not quite what moved: weights, scale and atoms are rounded. All of that is measured.
    weights, turns = weights.float(), turns.float()
    atoms = gram.low[support].float()
    reach = unit.squeeze(2) * screen.reach(origin, origin.to(low).float())[:, None]
    reach += screen.reach(moved - along @ gram.directions, torch.bmm(weights, atoms), gram.loss)
    reach += (along - turns).norm(dim=2) + half * turns.norm(dim=2)
    # So are the table and the estimates. Σₛ |wₛ Gₛₙ| ≤ ‖w‖ (Σₛ Gₛₙ²)^½ ≤ ‖w‖ ‖A_S‖ ‖aₙ‖ in the spectral norm.
    reach += half * weights.norm(dim=2) * _spectral_norm(atoms)[:, None]
    rounding = half * (scale.float() * estimates.abs().amax(1, keepdim=True).float()).amax(1)
    scale = scale.float()
    reach += scale * trial.noise
    sure = trial.scores - trial.noise * screen.norms[trial.choices]
    level = (scale * sure).masked_fill(~trial.valid, 1).amin(1) - rounding

    ceiling = screen.ceiling(peaks, reach.amax(1))
    values, suspects = largest(ceiling, min(SUSPECTS, ceiling.shape[1]))
    possible = values.float() * (1 + 1.5 * screen.spacing) >= level[:, None]
    certain = ~possible[:, -1] if len(screen.norms) > values.shape[1] else torch.ones_like(possible[:, -1])
    most = max(1, int(possible[certain].sum(1).max())) if bool(certain.any()) else 1
    return suspects[:, :most].masked_fill(~possible[:, :most], -1), certain


def _spectral_norm(rows: Tensor) -> Tensor:
    """An upper bound (B,) on the largest singular value of matrices (B, s, d): the eighth root of tr (M Mᵀ)⁸ is."""
    gram = torch.bmm(rows, rows.transpose(1, 2))
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    gram = gram / trace[:, None, None]
    fourth = torch.linalg.matrix_power(gram, 4)
    return (trace * fourth.flatten(1).norm(dim=1) ** 0.25).sqrt() * 1.001


def _correct(pursuit: Pursuit, trial: _Trial, suspects: Tensor, certain: Tensor) -> None:
    """Rescore the suspects exactly; from the first step that one of them may win, take back all, and let it win."""
    exact = score_exactly(pursuit.atoms, suspects.clamp(min=0), trial.residuals)  # (B, R, m)
    norms = pursuit.atom_norms[suspects.clamp(min=0)][:, None] + pursuit.atom_norms[trial.choices][:, :, None]
    margin = trial.noise[:, :, None] * norms
    other = (suspects[:, None] != trial.choices[:, :, None]) & (suspects >= 0)[:, None]
    contested = ((exact + margin >= trial.scores[:, :, None]) & other).any(2) & trial.valid
    contested[:, 0] |= ~certain
    rows = contested.any(1).nonzero().flatten()
    if not len(rows):
        return
    step = contested[rows].int().argmax(1)
    pursuit.rewind(rows, trial.start[rows] + step, trial.residuals[rows, step])

    known = certain[rows]
    rows, step = rows[known], step[known]
    part = pursuit.view(rows)
    mine = trial.choices[rows, step][:, None]
    candidates = torch.cat([mine, suspects[rows].masked_fill(suspects[rows] == mine, -1)], dim=1)
    scores = torch.cat([trial.scores[rows, step][:, None], exact[rows, step]], dim=1)
    choice, _ = decide(part, candidates, scores)
    choices = torch.zeros_like(pursuit.size).index_copy(0, rows, choice)
    pursuit.extend(choices, torch.zeros_like(pursuit.done).index_fill(0, rows, True))
