"""Which output tokens a model has no row for, and the anchors that can express them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_omp.solver import SparseCodes
from mergekit_omp.vocabulary.matching import VocabularyMatch


@dataclass(frozen=True, eq=False)
class Problem:
    """New tokens of a model that one donor has rows for, and the anchors of both.

    Shapes: B targets, N atoms, U under-trained; all int64.
    """

    target_ids: torch.Tensor  # (B,) output ids
    target_rows: torch.Tensor  # (B,) rows of the donor
    atom_ids: torch.Tensor  # (N,) output ids
    atom_rows: torch.Tensor  # (N,) rows of the donor
    untrained_ids: torch.Tensor  # (U,) output ids of new tokens that the donor has not learnt

    def without(self, ids: torch.Tensor) -> "Problem":
        """The problem without these targets, output ids int64 (I,)."""
        kept = ~torch.isin(self.target_ids, ids)
        return replace(
            self,
            target_ids=self.target_ids[kept],
            target_rows=self.target_rows[kept],
            untrained_ids=self.untrained_ids[~torch.isin(self.untrained_ids, ids)],
        )


@dataclass(frozen=True)
class TrainedRows:
    """Which rows belong to well-trained tokens: bool (R,) of the base, and of the donor."""

    base: torch.Tensor
    donor: torch.Tensor


@dataclass(frozen=True)
class Solution:
    """The sparse codes of one :class:`Problem`, with the seconds that they took."""

    problem: Problem
    codes: SparseCodes
    seconds: float


def pose_problem(
    base: VocabularyMatch,
    donor: VocabularyMatch,
    earlier: Sequence[VocabularyMatch] = (),
    trained: TrainedRows | None = None,
) -> Problem:
    """Find the new tokens of ``base`` that ``donor`` has and no ``earlier`` donor has, and the anchors of both.

    Args:
        base: match of the model that is realigned with the output vocabulary.
        donor: match of the donor with the same vocabulary.
        earlier: matches of the donors that take precedence.
        trained: which rows are well trained; None takes all for it. Text that the base has not learnt but the donor
            has is a target; what the donor has not learnt is neither an atom nor a target.
    """
    new = base.is_new()
    untrained = torch.zeros(len(donor.rows), dtype=torch.bool)
    atoms_of_donor = donor.atoms()
    if trained is not None:
        base = base.without((_untrained(base, trained.base) & base.is_text()).nonzero().flatten())
        untrained = _untrained(donor, trained.donor)
        atoms_of_donor = donor.without(untrained.nonzero().flatten()).atoms()
    candidates = base.is_new() & (donor.rows >= 0)
    for other in earlier:
        candidates &= other.rows < 0
    target_ids = (candidates & ~untrained).nonzero().squeeze(1)
    atom_ids = base.atoms()
    atom_ids = atom_ids[torch.isin(atom_ids, atoms_of_donor)]
    return Problem(
        target_ids,
        donor.rows[target_ids],
        atom_ids,
        donor.rows[atom_ids],
        untrained_ids=(candidates & untrained & new).nonzero().squeeze(1),
    )


def _untrained(match: VocabularyMatch, trained: torch.Tensor) -> torch.Tensor:
    """Boolean (V,): the output tokens whose row of a model is under-trained."""
    result = match.rows >= 0
    result[result.clone()] = ~trained[match.rows[result]]
    return result
