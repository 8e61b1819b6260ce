"""Rows that an input takes unchanged from models in its own matrix space, as mergekit does."""

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from mergekit.common import ModelReference

from mergekit_omp.checkpoints.architecture import VocabularyRole, hidden_size
from mergekit_omp.checkpoints.files import weight_file
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
    """Where an input takes rows from for tokens that it lacks and models in its space have.

    Equal for inputs that take the same tokens from the same models, so that they share their solves.

    Attributes:
        ranks: models in order of precedence; several of one rank that have a token give the mean of their rows.
        approximated: output ids that the recipe approximates in any case.
    """

    ranks: tuple[tuple[RecipeModel, ...], ...] = ()
    approximated: tuple[int, ...] = ()

    @property
    def models(self) -> tuple[RecipeModel, ...]:
        """All models that give rows."""
        return tuple(model for rank in self.ranks for model in rank)

    def among(self, models: Container[RecipeModel]) -> "Copies":
        """The same, from these models alone."""
        ranks = (tuple(model for model in rank if model in models) for rank in self.ranks)
        return Copies(tuple(filter(None, ranks)), self.approximated)

    def ids(self, match: VocabularyMatch) -> torch.Tensor:
        """Find the output ids, int64 (C,) ascending, whose rows a model with that match takes over."""
        found = [ids for _, ids in self.shares(match)]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *found]).sort().values

    def rows(
        self, match: VocabularyMatch, weights: Mapping[RecipeModel, torch.Tensor], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the rows that a model with that match takes over.

        Args:
            match: of the model that is realigned.
            weights: the matrix (R, ...) of each model that gives rows, vocabulary axis first; borrowed.
            like: the matrix of the model that is realigned, whose dtype and device the rows get.

        Returns:
            Output ids, int64 (C,), and their rows (C, ...): a single model's bit for bit, a mean in float32.
        """
        gathered = [(ids, _mean_rows(rank, ids, weights, like)) for rank, ids in self.shares(match)]
        ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(ids for ids, _ in gathered)])
        return ids, torch.cat([like[:0], *(rows for _, rows in gathered)])

    def shares(self, match: VocabularyMatch) -> Iterator[tuple[tuple[RecipeModel, ...], torch.Tensor]]:
        """Yield each rank that gives rows, with their output ids."""
        lacking = ~_has(match)
        lacking[list(self.approximated)] = False
        for rank in self.ranks:
            given = lacking & reduce(torch.logical_or, (_has(model.match) for model in rank))
            if given.any():
                yield rank, given.nonzero().flatten()
            lacking &= ~given


@dataclass(frozen=True)
class Offer:
    """Tokens that a model has and an input lacks.

    Attributes:
        source: the model.
        tokens: how many there are.
        similarity: of the rows of shared tokens, in the median; None where it was not measured.
        copied: whether the input takes the rows as they are; None where that is decided when the recipe runs.
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
    """Find the models in the space of ``model`` that have tokens which it lacks, and say so in the log.

    Args:
        model: an input.
        role: of the matrix.
        parameters: the model's.
        merged: the models that are merged in this tensor.
        transplant: the resolved recipe.
    """
    ranks = find_offers(model, role, parameters, merged, transplant)
    for offer in (offer for rank in ranks for offer in rank if offer.similarity is not None):
        LOG.info(
            "%s matrix: the rows of shared tokens of %s and %s have a median similarity of %.3f (%.1f is one space), "
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
    return copies_of(ranks, transplant)


def copies_of(ranks: Sequence[Sequence[Offer]], transplant: Transplant) -> Copies:
    """Take what is offered by models in the same space."""
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
    """Find what other models have that ``model`` lacks, in mergekit's order of precedence.

    That is the base model's row, else the mean of those of the merged models that have the token; after these come
    donors that are not merged.

    Args:
        model: an input.
        role: of the matrix.
        parameters: the model's.
        merged: the models that are merged in this tensor.
        transplant: the resolved recipe.
        local_only: leave open what needs weights that are not on this machine.
    """
    if parameters.copy_rows is CopyRows.NEVER:
        return []
    base = [transplant.base] if transplant.config.base_model is not None else []
    inputs = [other for other in transplant.inputs if other.reference in merged]
    donors = [other for other in transplant.donors if other.reference not in merged]
    if not needs_donor(parameters) and parameters.copy_rows is CopyRows.AUTO:
        donors = []  # its weights are not fetched for this alone
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
        found = measure_similarity(model, source, role, transplant)
        return Offer(source, tokens, found, copied=found is not None and found >= THRESHOLD)

    return [[found for source in rank if (found := offer(source))] for rank in ranks]


def measure_similarity(
    model: RecipeModel, other: RecipeModel, role: VocabularyRole, transplant: Transplant
) -> float | None:
    """Measure how similar the rows of two models are; None where their shapes differ or few tokens are shared."""
    ids = sample_anchors(model.match, other.match)
    weights = [_load(each, role, transplant) for each in (model, other)]
    rows = [each.match.rows[ids] for each in (model, other)]
    there = torch.stack([own < len(weight) for own, weight in zip(rows, weights, strict=True)]).all(dim=0)
    first, second = (weight[own[there]] for own, weight in zip(rows, weights, strict=True))
    if first.shape != second.shape or len(first) < FEWEST:
        return None
    return similarity(first, second)


def _has(match: VocabularyMatch) -> torch.Tensor:
    """Boolean (V,): the output tokens that a model has itself, and not just another of the same role or meaning."""
    return (match.rows >= 0) & ~torch.isin(match.reasons, _STAND_INS)


def _approximated(transplant: Transplant) -> tuple[int, ...]:
    """List the output ids that the recipe approximates in any case."""
    asked = (token for token, override in transplant.overrides.items() if asks_to_approximate(override))
    return tuple(map(transplant.id_of, asked))


def _is_local(model: RecipeModel) -> bool:
    folder = Path(model.reference.model.path)
    return model.reference.lora is None and folder.is_dir() and weight_file(folder) is not None


def _load(model: RecipeModel, role: VocabularyRole, transplant: Transplant) -> torch.Tensor:
    """Open a model's matrix (R, d) on the CPU; safetensors reads the rows that are used, and no others."""
    task, axis = vocabulary_matrix(model.reference, role, transplant.options, model.key)
    weight = task.model_copy(update={"device": None}).execute()
    return weight.movedim(axis, 0)


def _mean_rows(
    rank: Sequence[RecipeModel], ids: torch.Tensor, weights: Mapping[RecipeModel, torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    """Average the rows (C, ...) of the models of a rank that have the tokens."""
    total = torch.zeros(len(ids), *like.shape[1:], dtype=torch.promote_types(like.dtype, torch.float32))
    count = torch.zeros(len(ids))
    for model in rank:
        own = _has(model.match)[ids]
        weight = weights[model]
        rows = weight[model.match.rows[ids[own]].to(weight.device)].to(total)
        first = (count[own] == 0).view(-1, *[1] * (like.ndim - 1))
        total[own] = torch.where(first, rows, total[own] + rows)  # 0 + -0 is not -0
        count[own] += 1
    return (total / count.view(-1, *[1] * (like.ndim - 1))).to(like)
