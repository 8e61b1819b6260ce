"""What a user should know about a pair of tokenizers, told in the summary of a run."""

from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase

from mergekit_omp.checkpoints.tokenizers import (
    OutputTokenizer,
    match_of,
    output_vocabulary,
    shared_output_tokenizer,
    tokenizer_of,
    vocabulary_of,
)
from mergekit_omp.vocabulary.chat_template import chat_template_tokens
from mergekit_omp.vocabulary.numerals import numeral_scheme, numeral_warning


def advice(output: OutputTokenizer, model: ModelReference) -> list[str]:
    """Sentences on what the output tokenizer will ask of ``model`` that its own tokenizer did not."""
    ours, its = shared_output_tokenizer(output), tokenizer_of(model, output.trust_remote_code)
    found = [
        numeral_warning(
            numeral_scheme(ours, output_vocabulary(output)),
            numeral_scheme(its, vocabulary_of(model, output.trust_remote_code)),
        ),
        _bos_warning(ours, its),
        _chat_template_warning(output, model),
    ]
    return [f"{model}: {sentence}" for sentence in found if sentence]


def _chat_template_warning(output: OutputTokenizer, model: ModelReference) -> str | None:
    """The special tokens of the chat template that ships, as far as the model never saw them and no override helps."""
    tokenizer, vocabulary = shared_output_tokenizer(output), output_vocabulary(output)
    template = output.chat_template or getattr(tokenizer, "chat_template", None)
    rows = match_of(output, model).rows
    unseen = [id_ for id_ in sorted(chat_template_tokens(tokenizer, vocabulary, template)) if rows[id_] < 0]
    names = [vocabulary.tokens[id_].text for id_ in unseen]
    names = [name for name in names if name not in output.overridden]
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
