"""The methods of ``mergekit-tokensurgeon``, by mergekit's own functions, on this project's match of the vocabularies.

mergekit's ``compute_new_embeddings`` takes any hashable thing for a token: here it gets ids of the output vocabulary.
Everything is computed in float32, since some of its steps (``cdist``, ``lstsq``) know no half precision on a CPU.

Faults of 0.1.5 that are worked around: ``stb`` hands its options to ``compute_token_basis`` as k; ``john_hewitt``
fails where the rows' covariance is singular, on the length of an integer; ``mp_rope`` looks for ``rope_theta`` where
transformers 5 no longer keeps it; ``--prefix-match`` and ``--byte-match`` act on the wrong matrix, but matching is
this project's. One is kept: ``subword_method: weighted_mean`` gives the first piece the most weight in the embedding,
though the comment there says the last.
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
from mergekit_omp.vocabulary.segmentation import pieces

LOG = logging.getLogger(__name__)

TARGETS_AT_A_TIME = 512
"""As the command's default; a batch holds its distances to all anchors, [targets, anchors]."""

_NOWHERE = ModelReference.model_validate("unused")


def as_mergekit(new: NewTokens) -> RowFunction:
    """The methods that need nothing but mergekit's function; the same rows in every run.

    ``mean``: the mean of all rows of the model. ``zero``: zeros. ``randn``: standard normal noise. ``landmark_pca``:
    the donor's rows, turned into the model's space by the rotation between the principal axes of the anchors, which a
    randomized method finds.
    """

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        with _seeded(weight.device):
            return _Surgeon(new, weight).rows(is_head)

    return rows


def john_hewitt(new: NewTokens) -> RowFunction:
    """Draws from the normal distribution of the model's rows, the same in every run.

    After https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    count = len(new.problem.target_ids)

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        with _seeded(weight.device):
            try:
                return john_hewitt_init(weight.float(), count)
            except TypeError:  # the covariance is singular, as mergekit has just warned, and its way out fails
                return torch.randn(count, weight.shape[1], device=weight.device) * 0.02

    return rows


def common_interpolation(new: NewTokens) -> RowFunction:
    """A weighted mean of the k anchors that are nearest in the donor's space."""

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        surgeon = _Surgeon(new, weight)
        return torch.cat([surgeon.rows(is_head, part) for part in _parts(new.problem.target_ids)])

    return rows


def stb(new: NewTokens) -> RowFunction:
    """Sparse token basis: coordinates in a basis of which each vector is a combination of k anchors."""

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        surgeon = _Surgeon(new, weight)
        of_model = surgeon.of_model
        anchors = {token: surgeon.of_donor[token] for token in of_model}
        k = min(_sparsity(new), weight.shape[1], surgeon.donor.shape[1])  # a basis vector needs no more
        basis = compute_token_basis(surgeon.weight, surgeon.donor, of_model, anchors, [], k)
        return surgeon.rows(is_head, basis=basis)

    return rows


def mp_rope(new: NewTokens) -> RowFunction:
    """Matching pursuit over anchors that may be rotated as rotary position embeddings do.

    Raises:
        OmpError: the donor or the model has no rotary embeddings, or heads that do not divide its width.
    """
    donor_matrix, configs = new.donor, new.configs
    assert donor_matrix is not None, "asked for in the registry"
    assert configs is not None, "asked for in the registry"
    heads, bases = zip(*map(_rotary, configs), strict=True)

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        for count, width in zip(heads, (donor_matrix.shape[1], weight.shape[1]), strict=True):
            if width % (2 * count):
                raise OmpError(
                    f"approximation: mp_rope cannot split rows of {width} numbers into pairs in {count} heads; "
                    "name another approximation, such as omp."
                )
        donor = donor_matrix.to(weight.device).float()
        atoms = donor[new.problem.atom_rows.to(donor.device)]
        anchors = weight[new.anchor_rows.to(weight.device)].float()
        made = [
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
        return torch.cat(made)

    return rows


def subword(new: NewTokens) -> RowFunction:
    """The mean, sum, weighted mean, or one end, of the rows of the pieces that the model's tokenizer makes of a token.

    mergekit asks the tokenizer itself; many put a space before a text, and bytes that are no UTF-8 have no text. Here
    it is answered with the pieces as they are in the middle of a text. Tokens that cannot be written in the model's
    vocabulary get the mean of the anchors' rows, where mergekit leaves zeros.
    """
    ids = new.problem.target_ids.tolist()
    split = dict(zip(ids, pieces(new.output, new.tokenizer, ids, new.model), strict=True))
    unwritten = torch.tensor([not split[id_] for id_ in ids], dtype=torch.bool)
    if unwritten.any():
        LOG.info("%d new tokens cannot be written in the model's; they get the mean row", int(unwritten.sum()))

    def own_pieces(token: int, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": split[token]}

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        made = _Surgeon(new, weight).rows(is_head, tokenizer=own_pieces)
        made[unwritten.to(made.device)] = new.mean_row(weight)
        return made

    return rows


class _Surgeon:
    """mergekit's function with what it takes for one matrix of the model; copies in float32 are made once."""

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
        """mergekit's rows, float32 [B, D], for some ids [B] of the output, or for all targets."""
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
    """What mergekit takes for the two vocabularies: the anchors' rows of the model, and all rows of the donor."""
    problem = new.problem
    atoms = problem.atom_ids.tolist()
    of_donor = dict(zip(atoms, problem.atom_rows.tolist(), strict=True))
    of_donor.update(zip(problem.target_ids.tolist(), problem.target_rows.tolist(), strict=True))
    return dict(zip(atoms, new.anchor_rows.tolist(), strict=True)), of_donor


def _sparsity(new: NewTokens) -> int:
    return min(new.parameters.k, len(new.problem.atom_ids))


def _parts(ids: Tensor) -> Sequence[Tensor]:
    return ids.split(TARGETS_AT_A_TIME)


def _rotary(config: PretrainedConfig) -> tuple[int, float]:
    """Attention heads, and the base of the rotary embeddings."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    stored = getattr(text, "rope_parameters", None) or {}
    # Where layers differ, such as Gemma's, those that see the whole text count.
    base = stored.get("rope_theta") or stored.get("full_attention", {}).get("rope_theta")
    if not heads or not base:
        raise OmpError(
            f"approximation: mp_rope needs rotary position embeddings, and {config.model_type} has none; "
            "name another approximation, such as omp."
        )
    return heads, base


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Random numbers that are the same in every run, and leave those of others as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(NOISE_SEED)
        yield
