"""Build the output tokenizer that a recipe's ``tokenizer:`` section asks for, and read its vocabulary."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mergekit.common import ModelReference
from transformers import AddedToken, PreTrainedTokenizerBase

from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary


def with_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer, with the tokens that it lacks."""
    result = copy.deepcopy(tokenizer)
    present = result.get_vocab()
    result.add_tokens([token for token in tokens if token not in present])
    return result


def union_of(
    tokenizers: Mapping[ModelReference, PreTrainedTokenizerBase], rows: Mapping[ModelReference, int | None]
) -> PreTrainedTokenizerBase:
    """The first tokenizer with the tokens of all others, as mergekit's ``source: union`` builds it.

    mergekit adds one token at a time, which takes hours for two families. The tokens and their settings are the same,
    and so are their ids where ``get_vocab()`` lists tokens by id; it lists them in no order, so that mergekit's ids
    change from run to run, which these do not.

    Args:
        tokenizers: by model, the base's first.
        rows: of each model's embedding; tokens beyond them are left out. None stands for the tokenizer's own size,
            without added tokens.
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
    """The vocabulary of a union, in which a token stands for the bytes that it stands for where it came from.

    ``Ġthe`` that another model brings is " the", though the union's tokenizer holds it as an added token.
    """
    vocabulary = read_vocabulary(tokenizer)
    origin_of = {token.text: token for origin in reversed(origins) for token in origin.tokens.values()}
    tokens = {id_: replace(origin_of.get(token.text, token), id=id_) for id_, token in vocabulary.tokens.items()}
    return replace(vocabulary, tokens=tokens)
