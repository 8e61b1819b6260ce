"""From OMP's codes to rows in a model's own space."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mergekit_omp.initializers import RowRegression, pieces_of_anchors
from mergekit_omp.realign import Problem, Solution
from mergekit_omp.vocabulary.canonical import Vocabulary
from mergekit_omp.vocabulary.matching import VocabularyMatch
from mergekit_omp.vocabulary.pieces import ids_by_bytes
from mergekit_omp.vocabulary.pieces import pieces as split_by_tokenizer


@dataclass(frozen=True)
class Pieces:
    """How a model writes tokens in other tokens of its own: for each target and each atom the rows of the pieces."""

    targets: list[list[int]]
    atoms: list[list[int]]


@dataclass(frozen=True)
class Evidence:
    """What the rows of a solution's targets are made from; donor and pieces for the regression alone.

    Attributes:
        solution: codes of B targets over N atoms.
        donor: [R', d] the matrix that was solved in, vocabulary axis first.
        pieces: of the targets and the atoms.
    """

    solution: Solution
    donor: torch.Tensor | None = None
    pieces: Pieces | None = None


def split_tokens(
    problem: Problem, output: Vocabulary, model: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> Pieces:
    """Split the targets as the model's tokenizer does, and the atoms as the model would without the atom itself.

    Args:
        problem: the targets and atoms, by their ids in the output vocabulary.
        output: the output vocabulary.
        model: the model's vocabulary, of tokens that it has rows for.
        tokenizer: the model's tokenizer.
    """
    atoms = [output.tokens[id_].data for id_ in problem.atom_ids.tolist()]
    return Pieces(
        targets=split_by_tokenizer(output, tokenizer, problem.target_ids.tolist(), model),
        atoms=pieces_of_anchors(atoms, ids_by_bytes(model)),
    )


def reconstruct(evidence: Evidence, weight: torch.Tensor, match: VocabularyMatch) -> torch.Tensor:
    """The rows of a solution's targets in a model's space.

    Args:
        evidence: of B targets.
        weight: [R, ...] the model's tensor, vocabulary axis first; borrowed. The regression is for matrices; a bias
            [R] is combined in any case, as the logits are that it is added to.
        match: which of the R rows each output token has.

    Returns:
        float32 [B, ...] on the weight's device.
    """
    problem, codes = evidence.solution.problem, evidence.solution.codes
    atom_rows = match.rows[problem.atom_ids].to(weight.device)
    if evidence.donor is None or evidence.pieces is None or weight.ndim != 2:
        flat = weight[atom_rows].reshape(len(atom_rows), -1)
        return codes.apply(flat).reshape(-1, *weight.shape[1:])
    donor = evidence.donor.to(weight.device)
    anchors, targets = (donor[rows.to(donor.device)] for rows in (problem.atom_rows, problem.target_rows))
    regression = RowRegression.fit(anchors, weight, atom_rows, evidence.pieces.atoms)
    return regression.predict(targets, evidence.pieces.targets, codes)
