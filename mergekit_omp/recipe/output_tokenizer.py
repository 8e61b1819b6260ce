"""Build the output tokenizer of a recipe's ``tokenizer:`` section, and read its vocabulary."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mergekit.common import ModelReference
from transformers import AddedToken, PreTrainedTokenizerBase

from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary


def with_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer to which missing tokens are added."""
    result = copy.deepcopy(tokenizer)
    present = result.get_vocab()
    result.add_tokens([token for token in tokens if token not in present])
    return result


def union_of(
    tokenizers: Mapping[ModelReference, PreTrainedTokenizerBase], rows: Mapping[ModelReference, int | None]
) -> PreTrainedTokenizerBase:
    """Add the tokens of all other tokenizers to the first, as mergekit's ``source: union`` does.

    mergekit adds one token at a time, which takes hours for two model families. Tokens and their settings are the same
    here. Ids are the same if ``get_vocab()`` lists tokens by id. It has no defined order, so mergekit's ids change
    from run to run; these do not.

    Args:
        tokenizers: tokenizers by model, the base's first.
        rows: number of rows of each model's embedding; tokens beyond are omitted. None means the tokenizer's size
            without added tokens.

    Returns:
        The union, a new tokenizer.
    """
    result = copy.deepcopy(next(iter(tokenizers.values())))
    present = result.get_vocab()
    ordinary: dict[str, None] = {}
    added: dict[str, AddedToken] = {}
    for model, tokenizer in tokenizers.items():
        size = rows[model]
        size = tokenizer.vocab_size if size is None else size
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        ordinary.update((text, None) for text, id_ in by_id if id_ < size)
        for id_, token in tokenizer.added_tokens_decoder.items():
            if id_ < size:
                added.setdefault(token.content, token)
    result.add_tokens([text for text in ordinary if text not in added and text not in present])
    result.add_tokens(list(added.values()))
    return result


def union_vocabulary(tokenizer: PreTrainedTokenizerBase, origins: Sequence[Vocabulary]) -> Vocabulary:
    """Read the vocabulary of a union with the bytes that tokens have in the vocabulary they come from.

    ``Ġthe`` from another model means " the", although it is an added token of the union.
    """
    vocabulary = read_vocabulary(tokenizer)
    origin_of = {token.text: token for origin in reversed(origins) for token in origin.tokens.values()}
    tokens = {id_: origin_of.get(token.text, token)._replace(id=id_) for id_, token in vocabulary.tokens.items()}
    return replace(vocabulary, tokens=tokens)
