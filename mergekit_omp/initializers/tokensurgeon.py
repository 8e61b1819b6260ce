"""Run the methods of ``mergekit-tokensurgeon`` with mergekit's functions and this package's match of the vocabularies.

mergekit's ``compute_new_embeddings`` accepts any hashable object as a token: here these are output ids. Everything is
computed in float32, since some of its operations (``cdist``, ``lstsq``) do not support half precision on a CPU.

These bugs of mergekit 0.1.5 are worked around: ``stb`` passes its options to ``compute_token_basis`` as k;
``john_hewitt`` takes the length of an integer if the rows' covariance is singular; ``mp_rope`` reads ``rope_theta``
where transformers 5 does not store it; ``--prefix-match`` and ``--byte-match`` change the wrong matrix, but this
package does its own matching. One is kept: ``subword_method: weighted_mean`` gives the first piece the largest weight
in the embedding, although its comment says the last.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor
from transformers import PretrainedConfig

from mergekit_omp.compat import (
    ApproximationMethod,
    SubwordMethod,
    TokenSurgeonOptions,
    WeightingScheme,
    batch_mp_rope,
    compute_new_embeddings,
    compute_token_basis,
    john_hewitt_init,
)
from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.realign.rows import NOISE_SEED

LOG = logging.getLogger(__name__)

TARGETS_PER_BATCH = 512
"""Targets per batch, the default of the command; a batch needs its distances (targets, anchors) to all anchors."""

_NOWHERE = ModelReference.model_validate("unused")


def as_mergekit(new: NewTokens) -> RowFunction:
    """Run mergekit's function without changes and with a fixed seed.

    ``mean``: the mean of all rows of the model. ``zero``: zeros. ``randn``: standard normal noise. ``landmark_pca``:
    the donor's rows, mapped to the model's space by the rotation between the anchors' principal axes, which a
    randomized algorithm computes.
    """

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        with _seeded(weight.device):
            return _Surgeon(new, weight).rows(is_head)

    return rows


def john_hewitt(new: NewTokens) -> RowFunction:
    """Sample from the normal distribution of the model's rows, with a fixed seed.

    Source: https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    count = len(new.problem.target_ids)

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        with _seeded(weight.device):
            try:
                return john_hewitt_init(weight.float(), count)
            except TypeError:  # singular covariance: mergekit warns, and its fallback fails
                return torch.randn(count, weight.shape[1], device=weight.device) * 0.02

    return rows


def common_interpolation(new: NewTokens) -> RowFunction:
    """Compute a weighted mean of the k anchors that are nearest in the donor's space."""

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        surgeon = _Surgeon(new, weight)
        return torch.cat([surgeon.rows(is_head, part) for part in _parts(new.problem.target_ids)])

    return rows


def stb(new: NewTokens) -> RowFunction:
    """Compute coordinates in a sparse token basis, whose vectors are combinations of k anchors."""

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        surgeon = _Surgeon(new, weight)
        of_model = surgeon.of_model
        anchors = {token: surgeon.of_donor[token] for token in of_model}
        k = min(_sparsity(new), weight.shape[1], surgeon.donor.shape[1])  # a basis vector never needs more
        basis = compute_token_basis(surgeon.weight, surgeon.donor, of_model, anchors, [], k)
        return surgeon.rows(is_head, basis=basis)

    return rows


def mp_rope(new: NewTokens) -> RowFunction:
    """Run matching pursuit over anchors that may be rotated like rotary position embeddings.

    Raises:
        OmpError: if the donor or the model has no rotary embeddings, or heads that do not divide its width.
    """
    donor_matrix, configs = new.donor, new.configs
    assert donor_matrix is not None, "requested in the registry"
    assert configs is not None, "requested in the registry"
    heads, bases = zip(*map(_rotary, configs), strict=True)

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        for count, width in zip(heads, (donor_matrix.shape[1], weight.shape[1]), strict=True):
            if width % (2 * count):
                raise OmpError(
                    f"approximation: mp_rope cannot split rows of width {width} into pairs in {count} heads; "
                    "name another approximation, such as omp."
                )
        donor = donor_matrix.to(weight.device).float()
        atoms = donor[new.problem.atom_rows.to(donor.device)]
        anchors = weight[new.anchor_rows.to(weight.device)].float()
        batches = [
            batch_mp_rope(
                donor[part.to(donor.device)],
                atoms,
                anchors,
                k=_sparsity(new),
                num_heads_a=heads[0],
                num_heads_b=heads[1],
                a_rope_base=bases[0],
                b_rope_base=bases[1],
            )[2]
            for part in _parts(new.problem.target_rows)
        ]
        return torch.cat(batches)

    return rows


def subword(new: NewTokens) -> RowFunction:
    """Combine the rows of a token's pieces by their mean, sum, weighted mean or one end.

    mergekit calls the tokenizer. Many tokenizers prepend a space, and bytes that are not UTF-8 have no text. So
    mergekit gets the segmentation of the token in the middle of a text instead. Tokens without pieces get the mean of
    the anchors' rows, where mergekit uses zeros.
    """
    ids = new.problem.target_ids.tolist()
    split = dict(zip(ids, new.pieces(ids), strict=True))
    without_pieces = torch.tensor([not split[id_] for id_ in ids], dtype=torch.bool)
    if without_pieces.any():
        LOG.info(
            "%d new tokens have no pieces in the model's vocabulary and get the mean row", int(without_pieces.sum())
        )

    def pieces_of(token: int, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": split[token]}

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        new_rows = _Surgeon(new, weight).rows(is_head, tokenizer=pieces_of)
        new_rows[without_pieces.to(new_rows.device)] = new.mean_row(weight)
        return new_rows

    return rows


class _Surgeon:
    """Arguments of mergekit's function for one matrix of the model; float32 copies are made once."""

    def __init__(self, new: NewTokens, weight: Tensor) -> None:
        parameters = new.parameters
        self.ids = new.problem.target_ids
        self.weight = weight.float()
        self.donor = weight[:0] if new.donor is None else new.donor.to(weight.device).float()
        self.of_model, self.of_donor = _vocabularies(new)
        self.options = TokenSurgeonOptions(
            model=_NOWHERE,
            donor=_NOWHERE,
            out_path="",
            method=ApproximationMethod(parameters.approximation.value),
            k=_sparsity(new),
            weight_scheme=WeightingScheme(parameters.weight_scheme.value),
            cosine_similarity=parameters.cosine_similarity,
            subword_method=SubwordMethod(parameters.subword_method.value),
        )

    def rows(
        self,
        is_head: bool,
        ids: Tensor | None = None,
        basis: tuple[Tensor, Tensor] | None = None,
        tokenizer: Any = None,
    ) -> Tensor:
        """Return mergekit's rows float32 (B, D) for output ids (B,), or for all targets."""
        return compute_new_embeddings(
            self.weight,
            self.donor,
            self.of_model,
            self.of_donor,
            (self.ids if ids is None else ids).tolist(),
            is_head,
            basis,
            tokenizer,
            self.options,
        )


def _vocabularies(new: NewTokens) -> tuple[dict[int, int], dict[int, int]]:
    """Return mergekit's two vocabularies: the model's rows of the anchors, and the donor's rows of all tokens."""
    problem = new.problem
    atoms = problem.atom_ids.tolist()
    of_donor = dict(zip(atoms, problem.atom_rows.tolist(), strict=True))
    of_donor.update(zip(problem.target_ids.tolist(), problem.target_rows.tolist(), strict=True))
    return dict(zip(atoms, new.anchor_rows.tolist(), strict=True)), of_donor


def _sparsity(new: NewTokens) -> int:
    return min(new.parameters.k, len(new.problem.atom_ids))


def _parts(ids: Tensor) -> Sequence[Tensor]:
    return ids.split(TARGETS_PER_BATCH)


def _rotary(config: PretrainedConfig) -> tuple[int, float]:
    """Return the number of attention heads and the base of the rotary embeddings."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    stored = getattr(text, "rope_parameters", None) or {}
    # If layers differ, as in Gemma, use the layers with full attention.
    base = stored.get("rope_theta") or stored.get("full_attention", {}).get("rope_theta")
    if not heads or not base:
        raise OmpError(
            f"approximation: mp_rope needs rotary position embeddings, and {config.model_type} has none; "
            "name another approximation, such as omp."
        )
    return heads, base


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Fix torch's random seed in the block and restore the random state afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(NOISE_SEED)
        yield
