"""Find rows that an input copies from other models in its embedding space, as mergekit does."""

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from mergekit.common import ModelReference

from mergekit_omp.checkpoints.architecture import VocabularyRole, hidden_size
from mergekit_omp.checkpoints.files import check_weights, weight_file
from mergekit_omp.checkpoints.weights import vocabulary_matrix
from mergekit_omp.initializers.registry import needs_donor
from mergekit_omp.parameters import CopyRows, OmpParameters
from mergekit_omp.realign.space import FEWEST, THRESHOLD, sample_anchors, similarity
from mergekit_omp.recipe.overrides import asks_to_approximate
from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.vocabulary.matching import MatchReason, VocabularyMatch

LOG = logging.getLogger(__name__)

_STAND_INS = torch.tensor([MatchReason.SPECIAL_ROLE, MatchReason.SPECIAL_EQUIVALENT], dtype=torch.int8)


@dataclass(frozen=True)
class Copies:
    """The models from which an input copies rows of new tokens.

    Equal for inputs that copy the same tokens from the same models, so that they share their solves.

    Attributes:
        ranks: models in order of precedence; if several models of one rank have a token, its row is the mean of
            theirs.
        approximated: output ids that the recipe approximates in any case.
    """

    ranks: tuple[tuple[RecipeModel, ...], ...] = ()
    approximated: tuple[int, ...] = ()

    @property
    def models(self) -> tuple[RecipeModel, ...]:
        """All models that rows are copied from."""
        return tuple(model for rank in self.ranks for model in rank)

    def among(self, models: Container[RecipeModel]) -> "Copies":
        """Return the copies from these models only."""
        ranks = (tuple(model for model in rank if model in models) for rank in self.ranks)
        return Copies(tuple(filter(None, ranks)), self.approximated)

    def ids(self, match: VocabularyMatch) -> torch.Tensor:
        """Return the output ids int64 (C,), ascending, whose rows a model with this match copies."""
        found = [ids for _, ids in self.shares(match)]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *found]).sort().values

    def rows(
        self, match: VocabularyMatch, weights: Mapping[RecipeModel, torch.Tensor], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the rows that a model with this match copies.

        Args:
            match: match of the model that is realigned.
            weights: matrix (R, …) of each model that rows are copied from, vocabulary axis first; not modified.
            like: matrix of the model that is realigned, which determines the dtype and device of the rows.

        Returns:
            Output ids int64 (C,) and their rows (C, …): bit for bit from a single model, a mean is computed in
            float32.
        """
        gathered = [(ids, _mean_rows(rank, ids, weights, like)) for rank, ids in self.shares(match)]
        ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(ids for ids, _ in gathered)])
        return ids, torch.cat([like[:0], *(rows for _, rows in gathered)])

    def shares(self, match: VocabularyMatch) -> Iterator[tuple[tuple[RecipeModel, ...], torch.Tensor]]:
        """Yield each rank that rows are copied from, with their output ids int64 (C,)."""
        missing = ~_has(match)
        missing[list(self.approximated)] = False
        for rank in self.ranks:
            shared = missing & reduce(torch.logical_or, (_has(model.match) for model in rank))
            if shared.any():
                yield rank, shared.nonzero().flatten()
            missing &= ~shared


@dataclass(frozen=True)
class Offer:
    """New tokens of an input that another model has rows for.

    Attributes:
        source: the other model.
        tokens: number of tokens.
        similarity: median similarity of the rows of shared tokens; None if it was not measured.
        copied: whether the input copies the rows; None if this is decided when the recipe runs.
    """

    source: RecipeModel
    tokens: int
    similarity: float | None
    copied: bool | None


def find_copies(
    model: RecipeModel,
    role: VocabularyRole,
    parameters: OmpParameters,
    merged: Sequence[ModelReference],
    transplant: Transplant,
) -> Copies:
    """Find the models in the embedding space of an input that have rows for its new tokens, and log them once.

    Args:
        model: an input.
        role: role of the matrix.
        parameters: parameters of the input.
        merged: the models that are merged in this tensor.
        transplant: the resolved recipe.

    Returns:
        The models to copy from.
    """
    key = model, role, parameters, tuple(merged)
    if key in transplant.found_copies:
        return transplant.found_copies[key]
    ranks = find_offers(model, role, parameters, merged, transplant)
    for offer in (offer for rank in ranks for offer in rank if offer.similarity is not None):
        LOG.info(
            "%s: the rows of shared tokens of %s and %s have a median similarity of %.3f (threshold %.1f), "
            "so the rows of %d tokens of %s are %s",
            role.value,
            model,
            offer.source,
            offer.similarity,
            THRESHOLD,
            offer.tokens,
            offer.source,
            "copied" if offer.copied else "not copied",
        )
    transplant.found_copies[key] = copies_of(ranks, transplant)
    return transplant.found_copies[key]


def copies_of(ranks: Sequence[Sequence[Offer]], transplant: Transplant) -> Copies:
    """Select the offers of models in the same embedding space."""
    copied = (tuple(offer.source for offer in rank if offer.copied) for rank in ranks)
    return Copies(tuple(filter(None, copied)), _approximated(transplant))


def find_offers(
    model: RecipeModel,
    role: VocabularyRole,
    parameters: OmpParameters,
    merged: Sequence[ModelReference],
    transplant: Transplant,
    *,
    local_only: bool = False,
) -> list[list[Offer]]:
    """Find models with rows for the new tokens of an input, in mergekit's order of precedence.

    That is the base model, then the other merged models (the mean of their rows), then donors that are not merged.

    Args:
        model: an input.
        role: role of the matrix.
        parameters: parameters of the input.
        merged: the models that are merged in this tensor.
        transplant: the resolved recipe.
        local_only: do not decide offers that need weights which are not on this machine.

    Returns:
        The offers of each rank.
    """
    if parameters.copy_rows is CopyRows.NEVER:
        return []
    base = [transplant.base] if transplant.config.base_model is not None else []
    inputs = [other for other in transplant.inputs if other.reference in merged]
    donors = [other for other in transplant.donors if other.reference not in merged]
    if not needs_donor(parameters) and parameters.copy_rows is CopyRows.AUTO:
        donors = []  # avoids downloading weights only to compare them
    ranks = [
        [other for other in inputs if other in base],
        [other for other in inputs if other not in base],
        *([other] for other in donors),
    ]
    approximated = list(_approximated(transplant))

    def offer(source: RecipeModel) -> Offer | None:
        if source is model or source.config is None or model.config is None:
            return None
        if hidden_size(source.config) != hidden_size(model.config):
            return None
        offered = _has(source.match) & ~_has(model.match)
        offered[approximated] = False
        tokens = int(offered.sum())
        if not tokens:
            return None
        if parameters.copy_rows is CopyRows.ALWAYS:
            return Offer(source, tokens, None, copied=True)
        if local_only and not (_is_local(model) and _is_local(source)):
            return Offer(source, tokens, None, copied=None)
        for local in (model, source) if local_only else ():  # a run has checked them
            check_weights(local.reference, transplant.options, local.key)
        median = measure_similarity(model, source, role, transplant)
        return Offer(source, tokens, median, copied=median is not None and median >= THRESHOLD)

    return [[candidate for source in rank if (candidate := offer(source))] for rank in ranks]


def measure_similarity(
    model: RecipeModel, other: RecipeModel, role: VocabularyRole, transplant: Transplant
) -> float | None:
    """Return the median similarity of two models' rows; None if their shapes differ or they share too few tokens."""
    ids = sample_anchors(model.match, other.match)
    weights = [_open_matrix(m, role, transplant) for m in (model, other)]
    rows = [m.match.rows[ids] for m in (model, other)]
    stored = torch.stack([indices < len(weight) for indices, weight in zip(rows, weights, strict=True)]).all(dim=0)
    first, second = (weight[indices[stored]] for indices, weight in zip(rows, weights, strict=True))
    if first.shape != second.shape or len(first) < FEWEST:
        return None
    return similarity(first, second)


def _has(match: VocabularyMatch) -> torch.Tensor:
    """Return bool (V,): whether a model has an output token itself, not just one of the same role or meaning."""
    return (match.rows >= 0) & ~torch.isin(match.reasons, _STAND_INS)


def _approximated(transplant: Transplant) -> tuple[int, ...]:
    """Return the output ids that the recipe approximates in any case."""
    tokens = (token for token, override in transplant.overrides.items() if asks_to_approximate(override))
    return tuple(map(transplant.id_of, tokens))


def _is_local(model: RecipeModel) -> bool:
    folder = Path(model.reference.model.path)
    return model.reference.lora is None and folder.is_dir() and weight_file(folder) is not None


def _open_matrix(model: RecipeModel, role: VocabularyRole, transplant: Transplant) -> torch.Tensor:
    """Open a model's matrix (R, d) on the CPU; safetensors reads only the rows that are used."""
    task, axis = vocabulary_matrix(model.reference, role, transplant.options, model.key)
    weight = task.model_copy(update={"device": None}).execute()
    return weight.movedim(axis, 0)


def _mean_rows(
    rank: Sequence[RecipeModel], ids: torch.Tensor, weights: Mapping[RecipeModel, torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    """Average the rows (C, …) of the models of a rank that have the tokens."""
    total = torch.zeros(len(ids), *like.shape[1:], dtype=torch.promote_types(like.dtype, torch.float32))
    count = torch.zeros(len(ids))
    for model in rank:
        present = _has(model.match)[ids]
        weight = weights[model]
        rows = weight[model.match.rows[ids[present]].to(weight.device)].to(total)
        first = (count[present] == 0).view(-1, *[1] * (like.ndim - 1))
        total[present] = torch.where(first, rows, total[present] + rows)  # 0 + -0 is not -0
        count[present] += 1
    return (total / count.view(-1, *[1] * (like.ndim - 1))).to(like)
