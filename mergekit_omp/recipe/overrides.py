"""Apply overrides: the rows of single output tokens that ``tokenizer.tokens`` of a recipe sets.

The syntax is mergekit's, with two extensions: a ``model_token`` may name a text of several tokens, and ``force: true``
without a source approximates a token that the model has.
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
    """Tell whether an override approximates a token even in models that have it."""
    return override.force and override.source is None


def source_model(override: TokenEmbeddingConfig) -> ModelReference | None:
    """Return the model that an override takes a row from; None for other sources."""
    source = override.source
    reference = source.model if isinstance(source, ModelTokenEmbedding) else source
    return reference if isinstance(reference, ModelReference) else None


def source_rows(id_: int, override: TokenEmbeddingConfig, transplant: Transplant) -> tuple[RecipeModel, list[int]]:
    """Return the model that an override takes a row from, and the rows there: several for a text of several tokens.

    Args:
        id_: the output id of the token.
        override: an override whose source is an input or a token of an input.
        transplant: the resolved recipe.

    Returns:
        The model and its rows in the order of the text; no rows if the model has neither the token nor pieces for it.
        A ``token_id`` is not checked.
    """
    source = override.source
    if not isinstance(source, ModelTokenEmbedding):
        model = transplant.model(source)
        row = int(model.match.rows[id_])
        return model, [row] if row >= 0 else []
    model = transplant.model(source.model)
    if source.token_id is not None:
        return model, [source.token_id]
    same_text = next((token.id for token in model.vocabulary.tokens.values() if token.text == source.token), None)
    if same_text is not None:
        return model, [same_text]
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
    """Return the row (…) of an override with a source, for one tensor.

    For a text of several tokens, the row of the input embedding is the mean of their rows, since it represents all of
    them. The row of the LM head is the row of the first token, since it predicts the start of the text. A tied matrix
    is an input embedding.

    Args:
        id_: the output id of the token.
        override: the override.
        transplant: the resolved recipe.
        views: tensor (R, …) of the source and of other inputs, vocabulary axis first; not modified.
        role: role of the tensor.
    """
    if isinstance(override.source, ZeroEmbedding):
        weight = next(iter(views.values()))
        return weight.new_zeros(weight.shape[1:])
    model, rows = source_rows(id_, override, transplant)
    weight = views[model.reference]
    if role is VocabularyRole.HEAD or len(rows) == 1:
        return weight[rows[0]]
    token = getattr(override.source, "token", None)
    LOG.info("tokenizer.tokens: %r is not a token of %s; its %d pieces are used", token, model, len(rows))
    return weight[rows].float().mean(dim=0).to(weight.dtype)
