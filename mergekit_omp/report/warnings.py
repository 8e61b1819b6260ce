"""Warn about properties of the output tokenizer that affect an input."""

import json
from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mergekit_omp.checkpoints.architecture import position_settings
from mergekit_omp.checkpoints.files import find_file, processor_files
from mergekit_omp.checkpoints.tokenizers import named_tokens
from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.report.converters import converter_note, tokenizer_kind
from mergekit_omp.vocabulary.chat_template import absent_chat_tokens, chat_template_tokens
from mergekit_omp.vocabulary.numerals import numeral_scheme, numeral_warning


def warnings_for(model: RecipeModel, transplant: Transplant, copied: Collection[int] = ()) -> list[str]:
    """Return warnings about an input in combination with the output tokenizer.

    Args:
        model: the input.
        transplant: the resolved recipe.
        copied: output ids whose rows are copied from other models.

    Returns:
        The warnings, which begin with the name of the input.
    """
    warnings = [
        numeral_warning(
            numeral_scheme(transplant.tokenizer, transplant.vocabulary),
            numeral_scheme(model.tokenizer, model.vocabulary),
        ),
        _bos_warning(transplant.tokenizer, model.tokenizer),
        _chat_template_warning(model, transplant, copied),
        _absent_chat_tokens_warning(transplant) if model is transplant.base else None,
        _converter_warning(transplant) if model is transplant.base else None,
        _position_warning(model, transplant.base),
        _processor_warning(model, transplant) if model is transplant.base else None,
    ]
    return [f"{model}: {sentence}" for sentence in warnings if sentence]


def _chat_template_warning(model: RecipeModel, transplant: Transplant, copied: Collection[int]) -> str | None:
    """Warn about special tokens of the chat template that the model has no row, copy or override for."""
    tokenizer, vocabulary = transplant.tokenizer, transplant.vocabulary
    template = transplant.chat_template or getattr(tokenizer, "chat_template", None)
    rows = model.match.rows
    used = chat_template_tokens(tokenizer, vocabulary, template)
    without_row = [id_ for id_ in sorted(used) if rows[id_] < 0 and id_ not in copied]
    names = [vocabulary.tokens[id_].text for id_ in without_row]
    names = [name for name in names if name not in transplant.overridden]
    if not names:
        return None
    return (
        f"the chat template writes {', '.join(map(repr, names))}, whose rows are approximated or a mean; "
        "fine-tune before chatting, or give them rows in tokenizer.tokens."
    )


def _absent_chat_tokens_warning(transplant: Transplant) -> str | None:
    """Warn about control tokens of the recipe's chat template that the output tokenizer reads as text."""
    names = absent_chat_tokens(transplant.tokenizer, transplant.vocabulary, transplant.chat_template)
    if not names:
        return None
    return (
        f"chat_template: writes {', '.join(map(repr, names))}, which the output tokenizer has no token for and reads "
        "as text; name a template with its tokens, or add these in tokenizer.tokens."
    )


def _converter_warning(transplant: Transplant) -> str | None:
    """Warn if llama.cpp's converter cannot read the output tokenizer for the base's architecture."""
    config, backend = transplant.base.config, getattr(transplant.tokenizer, "backend_tokenizer", None)
    if config is None or backend is None:
        return None
    has_file = transplant.tokenizer_is_unchanged and find_file(transplant.donors[0].reference, "tokenizer.model")
    kind = tokenizer_kind(_described_without_tokens(backend), bool(has_file))
    return converter_note(config.model_type, kind)


def _described_without_tokens(backend: Tokenizer) -> dict[str, Any]:
    """Return what :func:`tokenizer_kind` reads of a tokenizer.json; all of it takes a second to write and to read."""
    model, decoder = backend.model, backend.decoder
    return {
        "model": {"type": type(model).__name__, "byte_fallback": getattr(model, "byte_fallback", False)},
        "decoder": None if decoder is None else json.loads(decoder.__getstate__()),
    }


def _position_warning(model: RecipeModel, base: RecipeModel) -> str | None:
    """Warn about position settings in which an input differs from the base, since the output has the base's."""
    if model.config is None or base.config is None:
        return None
    settings, base_settings = position_settings(model.config), position_settings(base.config)
    differ = [key for key in {**settings, **base_settings} if settings.get(key) != base_settings.get(key)]
    differences = [f"{key} {settings.get(key)} instead of {base_settings.get(key)}" for key in differ]
    if not differences:
        return None
    return (
        f"its position settings differ from those of {base}: {', '.join(differences)}. The output has those of "
        f"{base}, so the contribution of this model may lose quality, above all in long texts."
    )


def _processor_warning(model: RecipeModel, transplant: Transplant) -> str | None:
    """Warn about placeholder tokens for images and audio that the output vocabulary lacks."""
    names = named_tokens(model.tokenizer) if processor_files(model.reference) else {}
    if not names:
        return None
    texts = {token.text for token in transplant.vocabulary.tokens.values()}
    missing = sorted(set(names.values()) - texts)
    if not missing:
        return None
    return (
        f"it has image or audio input, and its processor needs {', '.join(map(repr, missing))}, which the output "
        f"vocabulary lacks; add them to tokenizer.tokens, such as `{missing[0]}: {{source: {model}}}`."
    )


def _bos_warning(output: PreTrainedTokenizerBase, model: PreTrainedTokenizerBase) -> str | None:
    """Warn if the output tokenizer omits bos: models trained with it, such as Gemma, are much worse without it."""
    if not _begins_with_bos(model) or _begins_with_bos(output):
        return None
    bos = repr(output.bos_token) if output.bos_token else "a token of that role"
    return (
        f"it was trained with {model.bos_token!r} at the start of every text, and its own tokenizer adds it; "
        f"the output tokenizer does not, so start prompts with {bos}."
    )


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
