"""Find the new tokens of a model and the anchors that approximate them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_omp.solver import SparseCodes
from mergekit_omp.vocabulary.matching import VocabularyMatch


@dataclass(frozen=True, eq=False)
class Problem:
    """New tokens of a model with rows in one donor, and the anchors of both.

    Attributes:
        target_ids: int64 (B,), output ids of the targets.
        target_rows: int64 (B,), their rows in the donor.
        atom_ids: int64 (N,), output ids of the atoms.
        atom_rows: int64 (N,), their rows in the donor.
        untrained_ids: int64 (U,), output ids of new tokens that are under-trained in the donor.
    """

    target_ids: torch.Tensor
    target_rows: torch.Tensor
    atom_ids: torch.Tensor
    atom_rows: torch.Tensor
    untrained_ids: torch.Tensor

    def without(self, ids: torch.Tensor) -> "Problem":
        """Return the problem without the targets with the output ids int64 (I,)."""
        kept = ~torch.isin(self.target_ids, ids)
        return replace(
            self,
            target_ids=self.target_ids[kept],
            target_rows=self.target_rows[kept],
            untrained_ids=self.untrained_ids[~torch.isin(self.untrained_ids, ids)],
        )


@dataclass(frozen=True)
class TrainedRows:
    """Rows of well-trained tokens: bool (R,) for the base, and for the donor."""

    base: torch.Tensor
    donor: torch.Tensor


@dataclass(frozen=True)
class Solution:
    """The sparse codes of one :class:`Problem`, and the seconds that the solve took."""

    problem: Problem
    codes: SparseCodes
    seconds: float


def pose_problem(
    base: VocabularyMatch,
    donor: VocabularyMatch,
    earlier: Sequence[VocabularyMatch] = (),
    trained: TrainedRows | None = None,
) -> Problem:
    """Find the new tokens of the base that the donor has and no earlier donor has, and the anchors.

    Args:
        base: match of the base with the output vocabulary.
        donor: match of the donor with the same vocabulary.
        earlier: matches of donors that take precedence.
        trained: rows of well-trained tokens; None means all rows. Text that is under-trained in the base but not in
            the donor is a target; tokens that are under-trained in the donor are neither atoms nor targets.
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
    """Return bool (V,): whether the model's row of an output token is under-trained."""
    result = match.rows >= 0
    result[result.clone()] = ~trained[match.rows[result]]
    return result
