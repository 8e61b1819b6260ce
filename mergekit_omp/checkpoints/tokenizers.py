"""The tokenizers and vocabularies of the models that a recipe names, each read once a run."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
import transformers
from mergekit.common import ModelReference
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from mergekit.tokenizer.build import build_union_tokenizer
from transformers import PreTrainedTokenizerBase

from mergekit_omp.checkpoints.architecture import vocabulary_size
from mergekit_omp.checkpoints.files import is_tokenizer_alone
from mergekit_omp.errors import OmpError
from mergekit_omp.tasks.placement import on_the_cpu
from mergekit_omp.vocabulary.duplicates import without_duplicates
from mergekit_omp.vocabulary.matching import VocabularyMatch, match_vocabulary
from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary


class OutputTokenizer(BuildTokenizer):
    """Build the tokenizer of the merged model.

    mergekit's own task also maps every vocabulary onto the output's by comparing strings, one token at a time, and
    refuses some tokenizers that it would have to strip for that. The mapping here is :func:`match_of`, so that is left
    out.
    """

    approximated: tuple[str, ...] = ()  # tokens that only the first donor's row counts for
    overridden: tuple[str, ...] = ()  # tokens that the recipe names a source of rows for
    chat_template: str | None = None  # the recipe's; None where the tokenizer keeps its own

    @on_the_cpu
    def execute(self, **_kwargs: object) -> TokenizerInfo:
        """The tokenizer alone; it is a new object, which mergekit may change."""
        return TokenizerInfo(tokenizer=build_output_tokenizer(self), permutations={}, original_vocabs={})

    def base(self) -> ModelReference:
        """The model that ``source: base`` and ``source: union`` start from."""
        return self.base_model or self.referenced_models[0]

    def is_unchanged(self) -> bool:
        """Whether it is a model's own tokenizer, without additions."""
        return self.tokenizer_source != "union" and not self.add_tokens

    def donors(self) -> tuple[ModelReference, ...]:
        """The models that give the rows which an input lacks, in order of precedence."""
        if isinstance(self.tokenizer_source, ModelReference):
            return (self.tokenizer_source,)
        return tuple(dict.fromkeys((self.base(), *self.referenced_models)))


def forget() -> None:
    """Drop everything that was read: a path may hold another model in the next run."""
    for cached in (_shared_tokenizer, _tokens_of, vocabulary_of, shared_output_tokenizer, output_vocabulary, match_of):
        cached.cache_clear()


class _UnreadableTokenizer(Exception):
    """Why a tokenizer cannot be read."""


def _load(model: ModelReference, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            model.model.path, revision=model.model.revision, trust_remote_code=trust_remote_code
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever the parsers raise; a panic in tokenizers' Rust is no Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _UnreadableTokenizer(reason) from error


_shared_tokenizer = lru_cache(maxsize=32)(_load)


def load_tokenizer(model: ModelReference, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer afresh.

    Raises:
        OmpError: naming the recipe ``key`` that the model stands under.
    """
    return _told(_load, model, trust_remote_code, key)


def tokenizer_of(model: ModelReference, trust_remote_code: bool, key: str = "models") -> PreTrainedTokenizerBase:
    """A model's tokenizer, shared: not to be changed.

    Raises:
        OmpError: as :func:`load_tokenizer`.
    """
    return _told(_shared_tokenizer, model, trust_remote_code, key)


def _told(
    load: Callable[..., PreTrainedTokenizerBase], model: ModelReference, trust_remote_code: bool, key: str
) -> PreTrainedTokenizerBase:
    try:
        return load(model, trust_remote_code)
    except _UnreadableTokenizer as error:
        raise OmpError(
            f"{key}: no tokenizer can be read from {model.model} ({error}); name a model with a tokenizer."
        ) from error


@lru_cache(maxsize=32)
def _tokens_of(model: ModelReference, trust_remote_code: bool) -> Vocabulary:
    """All tokens of a model's tokenizer."""
    return read_vocabulary(tokenizer_of(model, trust_remote_code))


@lru_cache(maxsize=32)
def vocabulary_of(model: ModelReference, trust_remote_code: bool) -> Vocabulary:
    """The tokens of a model that its embedding has rows for; all of them where there is a tokenizer alone."""
    vocabulary = _tokens_of(model, trust_remote_code)
    if is_tokenizer_alone(model):
        return vocabulary
    return vocabulary.truncated(vocabulary_size(model, trust_remote_code))


def donor_rows(output: OutputTokenizer) -> int | None:
    """Rows of the model that ``tokenizer.source`` names; None where it names none, or a tokenizer alone."""
    source = output.tokenizer_source
    if not isinstance(source, ModelReference) or is_tokenizer_alone(source):
        return None
    return vocabulary_size(source, output.trust_remote_code)


def build_output_tokenizer(output: OutputTokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe's ``tokenizer:`` section asks for, as a new object."""
    source, trust = output.tokenizer_source, output.trust_remote_code
    if source == "union":
        tokenizers = {model: tokenizer_of(model, trust) for model in output.donors()}
        result = build_union_tokenizer(tokenizers[output.base()], tokenizers, trust_remote_code=trust)
    else:
        result = load_tokenizer(output.donors()[0], trust, "tokenizer.source")
    present = result.get_vocab()
    result.add_tokens([token for token in output.add_tokens or () if token not in present])
    return result


@lru_cache(maxsize=4)
def shared_output_tokenizer(output: OutputTokenizer) -> PreTrainedTokenizerBase:
    """The output tokenizer, shared: not to be changed."""
    if output.is_unchanged():
        return tokenizer_of(output.donors()[0], output.trust_remote_code, "tokenizer.source")
    return build_output_tokenizer(output)


@lru_cache(maxsize=4)
def output_vocabulary(output: OutputTokenizer) -> Vocabulary:
    """The vocabulary of the output tokenizer, every id of which gets a row.

    In a union, a token stands for the bytes that it stands for in the vocabulary it came from: ``Ġthe`` that another
    model brings is " the", though the union's tokenizer holds it as an added token.
    """
    trust = output.trust_remote_code
    if output.is_unchanged():
        return _tokens_of(output.donors()[0], trust)
    vocabulary = read_vocabulary(shared_output_tokenizer(output))
    if output.tokenizer_source != "union":
        return vocabulary
    origins = [_tokens_of(model, trust) for model in output.donors()]
    origin_of = {token.text: token for origin in reversed(origins) for token in origin.tokens.values()}
    tokens = {id_: replace(origin_of.get(token.text, token), id=id_) for id_, token in vocabulary.tokens.items()}
    return replace(vocabulary, tokens=tokens)


@lru_cache(maxsize=32)
def match_of(output: OutputTokenizer, model: ModelReference) -> VocabularyMatch:
    """Which row of ``model`` each token of the output vocabulary has."""
    vocabulary = output_vocabulary(output)
    match = match_vocabulary(vocabulary, vocabulary_of(model, output.trust_remote_code))
    match = without_duplicates(match, vocabulary, shared_output_tokenizer(output))
    if not output.approximated or model == output.donors()[0]:
        return match
    ids = [id_ for id_, token in vocabulary.tokens.items() if token.text in output.approximated]
    return match.without(torch.tensor(ids, dtype=torch.int64))
