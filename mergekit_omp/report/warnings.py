"""What a user should know about a pair of tokenizers."""

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.vocabulary.chat_template import chat_template_tokens
from mergekit_omp.vocabulary.numerals import numeral_scheme, numeral_warning


def warnings_for(model: RecipeModel, transplant: Transplant, copied: Collection[int] = ()) -> list[str]:
    """Sentences on what the output tokenizer will ask of an input that its own tokenizer did not.

    Args:
        model: the input.
        transplant: the resolved recipe.
        copied: output ids whose rows other models of its space give.
    """
    warnings = [
        numeral_warning(
            numeral_scheme(transplant.tokenizer, transplant.vocabulary),
            numeral_scheme(model.tokenizer, model.vocabulary),
        ),
        _bos_warning(transplant.tokenizer, model.tokenizer),
        _chat_template_warning(model, transplant, copied),
    ]
    return [f"{model}: {sentence}" for sentence in warnings if sentence]


def _chat_template_warning(model: RecipeModel, transplant: Transplant, copied: Collection[int]) -> str | None:
    """Name the special tokens of the chat template that the model never saw and that no override helps."""
    tokenizer, vocabulary = transplant.tokenizer, transplant.vocabulary
    template = transplant.chat_template or getattr(tokenizer, "chat_template", None)
    rows = model.match.rows
    used = chat_template_tokens(tokenizer, vocabulary, template)
    unseen = [id_ for id_ in sorted(used) if rows[id_] < 0 and id_ not in copied]
    names = [vocabulary.tokens[id_].text for id_ in unseen]
    names = [name for name in names if name not in transplant.overridden]
    if not names:
        return None
    return (
        f"the chat template writes {', '.join(map(repr, names))}, whose rows are approximated or a mean; "
        "fine-tune before chatting, or give them rows in tokenizer.tokens."
    )


def _bos_warning(output: PreTrainedTokenizerBase, model: PreTrainedTokenizerBase) -> str | None:
    """Models that always saw a bos token first read much worse without one (Gemma is one of them)."""
    if not _begins_with_bos(model) or _begins_with_bos(output):
        return None
    bos = repr(output.bos_token) if output.bos_token else "a token of that role"
    return (
        f"it was trained with {model.bos_token!r} at the start of every text, and its own tokenizer adds it; "
        f"the output tokenizer does not, so begin prompts with {bos} yourself."
    )


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
