"""Rows from OMP's codes: the combination of a model's rows, or the regression that they correct."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.regression import RowRegression, pieces_of_anchors
from mergekit_omp.parameters import Reconstruction
from mergekit_omp.realign.problem import Problem
from mergekit_omp.vocabulary.segmentation import ids_by_bytes
from mergekit_omp.vocabulary.segmentation import pieces as split_by_tokenizer
from mergekit_omp.vocabulary.tokens import Vocabulary


def omp(new: NewTokens) -> RowFunction:
    """Σ cᵢ bᵢ of the codes and the anchors' rows, or the regression with the codes' correction.

    A bias [R] is combined in any case, as the logits are that it is added to.
    """
    codes = new.codes
    assert codes is not None, "asked for in the registry"
    regress = _regression(new) if new.parameters.reconstruction is Reconstruction.REGRESSION else None

    def rows(weight: torch.Tensor, _is_head: bool) -> torch.Tensor:
        if regress is not None and weight.ndim == 2:
            return regress(weight)
        anchors = weight[new.anchor_rows.to(weight.device)]
        return codes.apply(anchors.reshape(len(anchors), -1)).reshape(-1, *weight.shape[1:])

    return rows


def _regression(new: NewTokens) -> Callable[[torch.Tensor], torch.Tensor]:
    donor_matrix, codes = new.donor, new.codes
    assert donor_matrix is not None, "asked for in the registry"
    assert codes is not None, "asked for in the registry"
    split = split_tokens(new.problem, new.output, new.model, new.tokenizer)

    def rows(weight: torch.Tensor) -> torch.Tensor:
        donor = donor_matrix.to(weight.device)
        anchors, targets = (donor[each.to(donor.device)] for each in (new.problem.atom_rows, new.problem.target_rows))
        fitted = RowRegression.fit(anchors, weight, new.anchor_rows.to(weight.device), split.atoms)
        return fitted.predict(targets, split.targets, codes)

    return rows


@dataclass(frozen=True)
class Pieces:
    """How a model writes tokens in other tokens of its own: for each target and each atom the rows of the pieces."""

    targets: Sequence[Sequence[int]]
    atoms: Sequence[Sequence[int]]


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
