"""Segment the tokens of another vocabulary with a model's own tokenizer."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import failures_as
from mergekit_omp.vocabulary.byte_encoding import name_of, parts_of
from mergekit_omp.vocabulary.tokens import TokenKind, Vocabulary, read_vocabulary

Encoder = Callable[[Sequence[str]], list[list[int]]]


def pieces(
    output: Vocabulary,
    model_tokenizer: PreTrainedTokenizerBase,
    ids: Iterable[int],
    model: Vocabulary | None = None,
) -> list[list[int]]:
    """Segment tokens of the output vocabulary into tokens of a model.

    Each token is segmented like its text in the middle of a longer text: without special tokens, and without the space
    that many SentencePiece tokenizers prepend. If the result does not have the bytes of the token (invalid UTF-8, or
    text that the model's tokenizer normalizes), the longest matching tokens are used from left to right.

    Args:
        output: vocabulary of the output tokenizer.
        model_tokenizer: the model's own tokenizer.
        ids: ids of output tokens.
        model: the model's vocabulary, truncated to the rows that it has; read from its tokenizer if None.

    Returns:
        The pieces of each id, as ids of the model in order. Together they have the bytes of the token. If the model
        cannot write these bytes, they are the tokenizer's segmentation without unknown tokens, which may be empty.
    """
    model = model or read_vocabulary(model_tokenizer)
    token_bytes = [output.tokens[id_].data for id_ in ids]
    known_ids = model.ids_by_bytes
    longest = max(map(len, known_ids), default=0)
    split = []
    for data, encoded in zip(token_bytes, _encode_all(token_bytes, text_encoder(model_tokenizer, model)), strict=True):
        known = [id_ for id_ in encoded if id_ in model.tokens and model.tokens[id_].is_text]
        spelled = b"".join(model.tokens[id_].data for id_ in known) == data
        split.append(known if spelled else spell(data, known_ids, longest) or known)
    return split


def text_encoder(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, *, special: bool = False) -> Encoder:
    """Build an encoder for fragments of a text: without special tokens, added spaces and stripping.

    Args:
        tokenizer: tokenizer to imitate; not modified.
        vocabulary: its vocabulary.
        special: whether to recognise special tokens in a text, instead of reading them as ordinary characters.

    Returns:
        A function from texts to lists of ids. The lists are empty for a tokenizer without a ``tokenizers`` backend.
        It raises an OmpError if the tokenizer cannot split a text, such as one with an unknown character.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: [[] for _ in texts]
    encoder = Tokenizer(backend.model)
    encoder.normalizer, encoder.pre_tokenizer = _without_added_space(backend)
    added = tokenizer.added_tokens_decoder
    added_ids = {
        token.content: id_
        for id_, token in added.items()
        if id_ in vocabulary.tokens and (special or vocabulary.tokens[id_].kind is TokenKind.ORDINARY)
    }
    encoder.add_tokens([added[id_] for id_ in added_ids.values()])
    original_id = {
        new: id_ for content, id_ in added_ids.items() if (new := encoder.token_to_id(content)) not in (None, id_)
    }

    def encode(texts: Sequence[str]) -> list[list[int]]:
        with failures_as(
            lambda reason: f"The tokenizer {name_of(tokenizer)} cannot split a text ({reason}); name another one."
        ):
            encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        encoded = [encoding.ids for encoding in encodings]
        return [[original_id.get(id_, id_) for id_ in ids] for ids in encoded] if original_id else encoded

    return encode


def _encode_all(token_bytes: Sequence[bytes], encode: Encoder) -> Iterator[list[int]]:
    """Encode byte strings; those that are not valid UTF-8 get no ids."""
    texts = [text_of(data) for data in token_bytes]
    encoded = iter(encode([text for text in texts if text is not None]))
    return ([] if text is None else next(encoded) for text in texts)


def text_of(data: bytes) -> str | None:
    """Decode bytes as UTF-8; return None if they are not valid."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def spell(data: bytes, ids: Mapping[bytes, int], longest: int) -> list[int]:
    """Segment bytes greedily into the longest tokens of at most ``longest`` bytes; return [] if that is impossible.

    Example:
        >>> from mergekit_omp.vocabulary.segmentation import spell
        >>> spell(b"undo", {b"u": 0, b"n": 1, b"un": 2, b"do": 3}, longest=2)
        [2, 3]
    """
    spelled, start = [], 0
    while start < len(data):
        for end in range(min(len(data), start + longest), start, -1):
            if (id_ := ids.get(data[start:end])) is not None:
                break
        else:
            return []
        spelled.append(id_)
        start = end
    return spelled


def _without_added_space(backend: Tokenizer) -> tuple[Any, Any]:
    """Return the normalizer and pre-tokenizer of a backend without the parts that add or strip spaces at text ends."""
    normalizers = [part for part in parts_of(backend.normalizer) if part["type"] not in ("Prepend", "Strip")]
    pre_tokenizers = []
    for part in parts_of(backend.pre_tokenizer):
        if part["type"] == "Metaspace":
            part = part | {"prepend_scheme": "never"}
        elif part["type"] == "ByteLevel":
            part = part | {"add_prefix_space": False}
        pre_tokenizers.append(part)
    declared: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
        "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
    }
    rebuilt = Tokenizer.from_str(json.dumps(declared))
    return rebuilt.normalizer, rebuilt.pre_tokenizer
