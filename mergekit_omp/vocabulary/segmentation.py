"""How a model's own tokenizer would split the tokens of another vocabulary."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.byte_encoding import parts_of
from mergekit_omp.vocabulary.tokens import TokenKind, Vocabulary, read_vocabulary

Encoder = Callable[[Sequence[str]], list[list[int]]]
_TEXT = (TokenKind.ORDINARY, TokenKind.BYTE)


def pieces(
    output: Vocabulary,
    model_tokenizer: PreTrainedTokenizerBase,
    ids: Iterable[int],
    model: Vocabulary | None = None,
) -> list[list[int]]:
    """Split tokens of the output vocabulary into tokens of a model.

    Each token is split as its text would be in the middle of a text: without special tokens, and without the space
    that many SentencePiece tokenizers put before a text. Where that does not spell the token's bytes (bytes that are
    no valid UTF-8, or text that the model's tokenizer normalizes), the longest tokens that do are taken in order.

    Args:
        output: the output tokenizer's vocabulary.
        model_tokenizer: the model's own tokenizer.
        ids: ids of output tokens.
        model: the model's vocabulary, truncated to the rows that it has; read from its tokenizer if None.

    Returns:
        For each id the model's ids, in order. Their bytes together are the token's, save where the model has no way to
        write those bytes: then what its tokenizer makes of the text, without unknown tokens, which may be nothing.
    """
    model = model or read_vocabulary(model_tokenizer)
    wanted = [output.tokens[id_].data for id_ in ids]
    known_ids = ids_by_bytes(model)
    longest = max(map(len, known_ids), default=0)
    split = []
    for data, encoded in zip(wanted, _encode_all(wanted, text_encoder(model_tokenizer, model)), strict=True):
        known = [id_ for id_ in encoded if id_ in model.tokens and model.tokens[id_].kind in _TEXT]
        spelled = b"".join(model.tokens[id_].data for id_ in known) == data
        split.append(known if spelled else spell(data, known_ids, longest) or known)
    return split


def text_encoder(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, *, special: bool = False) -> Encoder:
    """An encoder of texts as they are in the middle of a text: no special tokens, no added space, no stripping.

    Args:
        tokenizer: left as it is.
        vocabulary: its vocabulary.
        special: whether special tokens that stand in a text are read as such, instead of as ordinary characters.

    Returns:
        A function from texts to lists of ids. For a tokenizer without a ``tokenizers`` backend it finds no ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: [[] for _ in texts]
    encoder = Tokenizer(backend.model)
    encoder.normalizer, encoder.pre_tokenizer = _without_added_space(backend)
    added = tokenizer.added_tokens_decoder
    cut_out = {
        token.content: id_
        for id_, token in added.items()
        if id_ in vocabulary.tokens and (special or vocabulary.tokens[id_].kind is TokenKind.ORDINARY)
    }
    encoder.add_tokens([added[id_] for id_ in cut_out.values()])
    own_id = {encoder.token_to_id(content): id_ for content, id_ in cut_out.items()}

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[own_id.get(id_, id_) for id_ in encoding.ids] for encoding in encodings]

    return encode


def _encode_all(wanted: Sequence[bytes], encode: Encoder) -> Iterator[list[int]]:
    """Encode byte strings; no ids for those that are no text."""
    texts = [text_of(data) for data in wanted]
    encoded = iter(encode([text for text in texts if text is not None]))
    return ([] if text is None else next(encoded) for text in texts)


def text_of(data: bytes) -> str | None:
    """The text that bytes are, None where they are none by themselves."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def ids_by_bytes(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The id for every byte string that a vocabulary has text for: an ordinary token before a byte-fallback one."""
    ids: dict[bytes, int] = {}
    for kind in _TEXT:
        for id_, token in vocabulary.tokens.items():
            if token.kind is kind:
                ids.setdefault(token.data, id_)
    return ids


def spell(data: bytes, ids: Mapping[bytes, int], longest: int) -> list[int]:
    """Spell bytes by the longest tokens of at most ``longest`` bytes, from left to right; [] where none fit."""
    spelled, start = [], 0
    while start < len(data):
        ends = range(min(len(data), start + longest), start, -1)
        end = next((end for end in ends if data[start:end] in ids), None)
        if end is None:
            return []
        spelled.append(ids[data[start:end]])
        start = end
    return spelled


def _without_added_space(backend: Tokenizer) -> tuple[Any, Any]:
    """The normalizer and pre-tokenizer of a backend, less what adds or strips spaces at the ends of a text."""
    normalizers = [
        part for part in parts_of(backend.normalizer, "normalizers") if part["type"] not in ("Prepend", "Strip")
    ]
    pre_tokenizers = []
    for part in parts_of(backend.pre_tokenizer, "pretokenizers"):
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
