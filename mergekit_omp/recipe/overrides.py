"""Overrides: what ``tokenizer.tokens`` in a recipe says about the rows of single tokens of the output.

The grammar is mergekit's. It gains two meanings that mergekit has no use for: a ``model_token`` may name a text of
several tokens, and ``force: true`` without a source asks to approximate a token that the model has.
"""

import logging
from collections.abc import Mapping

import torch
from mergekit.common import ModelReference
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, ZeroEmbedding

from mergekit_omp.checkpoints.architecture import VocabularyRole
from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.vocabulary.segmentation import text_encoder

LOG = logging.getLogger(__name__)


def asks_to_approximate(override: TokenEmbeddingConfig) -> bool:
    """Whether an override says that a token is approximated even by models that have it."""
    return override.force and override.source is None


def source_rows(id_: int, override: TokenEmbeddingConfig, transplant: Transplant) -> tuple[RecipeModel, list[int]]:
    """The model that an override takes a token's row from, and the rows there: several for a text of several tokens.

    Args:
        id_: the output id of the token.
        override: one whose source is an input or a token of one.
        transplant: the resolved recipe.

    Returns:
        The model, and its rows in the order of the text; none where the model has no such token and cannot spell it.
        Rows named by ``token_id`` are not checked to be there.
    """
    source = override.source
    if not isinstance(source, ModelTokenEmbedding):
        model = transplant.model(source)
        row = int(model.match.rows[id_])
        return model, [row] if row >= 0 else []
    model = transplant.model(source.model)
    if source.token_id is not None:
        return model, [source.token_id]
    same = next((token.id for token in model.vocabulary.tokens.values() if token.text == source.token), None)
    if same is not None:
        return model, [same]
    [rows] = text_encoder(model.tokenizer, model.vocabulary, special=True)([source.token])
    unknown = model.vocabulary.roles.get("unk")
    return model, rows if all(row in model.vocabulary.tokens and row != unknown for row in rows) else []


def override_row(
    id_: int,
    override: TokenEmbeddingConfig,
    transplant: Transplant,
    views: Mapping[ModelReference, torch.Tensor],
    role: VocabularyRole,
) -> torch.Tensor:
    """The row (...) that an override with a source gives a token, in one tensor.

    A text of several tokens gives the mean of their rows to the input embedding, which is to say what all of them
    mean, and the row of the first to the LM head, which is to predict when the text begins. A tied matrix is an input
    embedding.

    Args:
        id_: the output id of the token.
        override: what to do.
        transplant: the resolved recipe.
        views: the tensor (R, ...) of each input, vocabulary axis first; borrowed.
        role: the side of the model that the tensor belongs to.
    """
    if isinstance(override.source, ZeroEmbedding):
        weight = next(iter(views.values()))
        return weight.new_zeros(weight.shape[1:])
    model, rows = source_rows(id_, override, transplant)
    weight = views[model.reference]
    if role is VocabularyRole.HEAD or len(rows) == 1:
        return weight[rows[0]]
    token = getattr(override.source, "token", None)
    LOG.info("tokenizer.tokens: %r is no token of %s, so its %d pieces are used", token, model, len(rows))
    return weight[rows].float().mean(dim=0).to(weight.dtype)
