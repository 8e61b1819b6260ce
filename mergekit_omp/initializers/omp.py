"""Make rows from sparse codes: by combination of a model's rows, or by regression with a correction."""

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
    """Make rows by combination, Σ cᵢ bᵢ (arXiv:2506.06607, section 3), or by regression with the codes' correction.

    A bias (R,) is always combined, like the logits that it is added to.
    """
    codes = new.codes
    assert codes is not None, "requested in the registry"
    regress = _regression(new) if new.parameters.reconstruction is Reconstruction.REGRESSION else None

    def rows(weight: torch.Tensor, _is_head: bool) -> torch.Tensor:
        if regress is not None and weight.ndim == 2:
            return regress(weight)
        anchors = weight[new.anchor_rows.to(weight.device)]
        return codes.apply(anchors.reshape(len(anchors), -1)).reshape(-1, *weight.shape[1:])

    return rows


def _regression(new: NewTokens) -> Callable[[torch.Tensor], torch.Tensor]:
    donor_matrix, codes = new.donor, new.codes
    assert donor_matrix is not None, "requested in the registry"
    assert codes is not None, "requested in the registry"
    split = split_tokens(new.problem, new.output, new.model, new.tokenizer)

    def rows(weight: torch.Tensor) -> torch.Tensor:
        donor = donor_matrix.to(weight.device)
        anchors, targets = (donor[ids.to(donor.device)] for ids in (new.problem.atom_rows, new.problem.target_rows))
        fitted = RowRegression.fit(anchors, weight, new.anchor_rows.to(weight.device), split.atoms)
        return fitted.predict(targets, split.targets, codes)

    return rows


@dataclass(frozen=True)
class Pieces:
    """Segmentation of targets and atoms into other tokens of the model: the rows of the pieces of each."""

    targets: Sequence[Sequence[int]]
    atoms: Sequence[Sequence[int]]


def split_tokens(
    problem: Problem, output: Vocabulary, model: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> Pieces:
    """Segment the targets with the model's tokenizer, and each atom into other tokens of the model.

    Args:
        problem: targets and atoms, by output id.
        output: the output vocabulary.
        model: the model's vocabulary, restricted to tokens with rows.
        tokenizer: the model's tokenizer.
    """
    atoms = [output.tokens[id_].data for id_ in problem.atom_ids.tolist()]
    return Pieces(
        targets=split_by_tokenizer(output, tokenizer, problem.target_ids.tolist(), model),
        atoms=pieces_of_anchors(atoms, ids_by_bytes(model)),
    )
