"""Make rows from sparse codes: by combination of a model's rows, or by regression with a correction."""

from collections.abc import Callable

import torch

from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.regression import RowRegression, pieces_of_anchors
from mergekit_omp.parameters import Reconstruction


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
    targets_split = new.pieces(new.problem.target_ids.tolist())
    data = [new.output.tokens[id_].data for id_ in new.problem.atom_ids.tolist()]
    atoms_split = pieces_of_anchors(data, new.model.ids_by_bytes)

    def rows(weight: torch.Tensor) -> torch.Tensor:
        donor = donor_matrix.to(weight.device)
        anchors, targets = (donor[ids.to(donor.device)] for ids in (new.problem.atom_rows, new.problem.target_rows))
        fitted = RowRegression.fit(anchors, weight, new.anchor_rows.to(weight.device), atoms_split)
        return fitted.predict(targets, targets_split, codes)

    return rows
