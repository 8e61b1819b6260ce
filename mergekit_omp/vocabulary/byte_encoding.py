"""Read how a tokenizer writes bytes as token strings from its decoder, pre-tokenizer, normalizer and model.

Only the declarations that ``tokenizer.json`` contains count, not the class that a tokenizer is loaded as.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError

SENTENCEPIECE_SPACE = "▁"
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each of the 256 characters of byte-level BPE (GPT-2, section 2.2).

    Bytes that are printable in Latin-1 stand for themselves; the other 68 use the code points from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET: Mapping[str, int] = _byte_alphabet()
_CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_ALPHABET.items()}
_OUTSIDE = "\N{REPLACEMENT CHARACTER}"
_TO_LATIN_1 = dict.fromkeys(range(256), _OUTSIDE) | {ord(letter): byte for letter, byte in BYTE_ALPHABET.items()}
"""For ``str.translate``: the Latin-1 character of each byte, and none of them for other characters."""


def as_text(token: str | bytes) -> str:
    """Return a token as a string; bytes, as tiktoken's vocabularies have, are written in the byte-level alphabet."""
    return token if isinstance(token, str) else "".join(map(_CHARACTER_OF_BYTE.__getitem__, token))


@dataclass(frozen=True)
class TextScheme:
    """The mapping from token strings to bytes.

    Attributes:
        byte_level: strings are written in ``BYTE_ALPHABET`` (GPT-2, Llama 3, Qwen, Tekken, SmolLM2).
        replacements: (written, decoded) pairs, in order; ("▁", " ") for SentencePiece.
        byte_fallback: ``<0x0A>`` is the byte 0x0A (Llama 2, Mistral, Gemma).
        continuation: prefix of a token that continues a word ("##" of WordPiece). A token without it starts a word and
            decodes to a space and the word, like `` word`` or ``▁word``; punctuation marks and ideographs, which
            WordPiece always separates, decode to themselves.
        word_end: suffix of a token that ends a word ("</w>"), which decodes to a space.
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    continuation: str | None = None
    word_end: str | None = None

    def ordinary_bytes(self, text: str) -> bytes:
        """Return the bytes of a token of the tokenizer model's vocabulary."""
        if self.word_end and text.endswith(self.word_end):
            return self._plain_bytes(text.removesuffix(self.word_end)) + b" "
        if self.continuation is not None:
            if text.startswith(self.continuation) and text != self.continuation:
                return self._plain_bytes(text.removeprefix(self.continuation))
            return self._plain_bytes(text) if _stands_alone(text) else b" " + self._plain_bytes(text)
        return self._plain_bytes(text)

    def bytes_of_all(self, texts: Sequence[str]) -> list[bytes]:
        """Return :meth:`ordinary_bytes` of each text; those of a byte-level vocabulary are translated together."""
        if self.byte_level and self.continuation is None and not self.word_end:
            try:
                data = "".join(texts).translate(_TO_LATIN_1).encode("latin-1")
            except UnicodeEncodeError:  # some are literal text
                pass
            else:
                return [data[start:end] for start, end in pairwise(accumulate(map(len, texts), initial=0))]
        return [self.ordinary_bytes(text) for text in texts]

    def added_bytes(self, text: str) -> bytes:
        """Return the bytes of an added token: its literal text, with SentencePiece's replacements applied."""
        return text.encode(errors="surrogatepass") if self.byte_level else self._plain_bytes(text)

    def fallback_byte(self, text: str) -> int | None:
        """Return the byte of a byte-fallback token, or None for any other token."""
        if not (self.byte_fallback and text.startswith("<0x")):
            return None
        match = _BYTE_FALLBACK.fullmatch(text)
        return int(match.group(1), 16) if match else None

    def _plain_bytes(self, text: str) -> bytes:
        if self.byte_level:
            try:
                return text.translate(_TO_LATIN_1).encode("latin-1")
            except UnicodeEncodeError:  # the library's decoder treats strings outside the alphabet as literal text
                return text.encode(errors="surrogatepass")
        byte = self.fallback_byte(text)
        if byte is not None:
            return bytes([byte])
        for written, decoded in self.replacements:
            text = text.replace(written, decoded)
        return text.encode(errors="surrogatepass")


def read_scheme(tokenizer: PreTrainedTokenizerBase) -> TextScheme:
    """Read the scheme from a tokenizer's ``tokenizers`` backend, SentencePiece model or byte map.

    Raises:
        OmpError: if the tokenizer has none of them, or has a component of unknown meaning.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _backend_scheme(backend)
    if getattr(tokenizer, "sp_model", None) is not None:
        return TextScheme(replacements=((SENTENCEPIECE_SPACE, " "),), byte_fallback=True)
    if isinstance(getattr(tokenizer, "byte_decoder", None), Mapping) or _lists_bytes(tokenizer):
        return TextScheme(byte_level=True)
    raise OmpError(
        f"The tokenizer {name_of(tokenizer)} has neither a tokenizer.json, nor a SentencePiece model, nor a table of "
        "bytes, so the bytes of its tokens are unknown; save it as a fast tokenizer (one with a tokenizer.json) "
        "and name that folder instead."
    )


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a tokenizer for messages: the path it was loaded from, or its class."""
    return repr(getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__)


def _lists_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    return any(isinstance(token, bytes) for token in tokenizer.get_vocab())


def _backend_scheme(backend: Any) -> TextScheme:
    decoders = list(parts_of(backend.decoder))
    model = backend.model
    if not decoders:
        decoders = _implied_decoders(backend)
    continuation = getattr(model, "continuing_subword_prefix", None) or None
    return TextScheme(
        byte_level=any(part["type"] == "ByteLevel" for part in decoders),
        replacements=tuple(_replacements(decoders)),
        byte_fallback=bool(getattr(model, "byte_fallback", False))
        or any(part["type"] == "ByteFallback" for part in decoders),
        continuation=next((part["prefix"] for part in decoders if part["type"] == "WordPiece"), continuation),
        word_end=next((part["suffix"] for part in decoders if part["type"] == "BPEDecoder"), None)
        or getattr(model, "end_of_word_suffix", None)
        or None,
    )


def parts_of(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the declarations of a ``tokenizers`` component, with sequences flattened; nothing for None."""
    if component is None:
        return
    try:
        declared = json.loads(component.__getstate__())
    except Exception as error:  # the library raises a bare Exception for a component written in Python
        raise OmpError(
            f"The tokenizer's {type(component).__name__} is custom Python code that cannot be read ({error}); "
            "use a tokenizer whose tokenizer.json describes it fully."
        ) from error
    yield from flattened(declared)


def flattened(declared: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the parts of a component as tokenizer.json declares it, with sequences flattened; nothing for None."""
    if declared is None:
        return
    if declared["type"] != "Sequence":
        yield declared
        return
    [children] = [value for key, value in declared.items() if key != "type"]
    for child in children:
        yield from flattened(child)


def _implied_decoders(backend: Any) -> list[dict[str, Any]]:
    """Derive decoders from the normalizer and pre-tokenizer of a tokenizer without a decoder."""
    before = [*parts_of(backend.normalizer), *parts_of(backend.pre_tokenizer)]
    implied = []
    for part in before:
        if part["type"] in ("ByteLevel", "Metaspace"):
            implied.append(part)
        elif part["type"] == "Replace" and part["pattern"] == {"String": " "}:
            implied.append({"type": "Replace", "pattern": {"String": part["content"]}, "content": " "})
    return implied


def _replacements(decoders: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for part in decoders:
        if part["type"] == "Metaspace":
            yield part["replacement"], " "
        elif part["type"] == "Replace":
            if "String" not in part["pattern"]:
                raise OmpError(
                    f"The tokenizer's decoder replaces the expression {part['pattern']!r}, which does not "
                    "define the bytes of a single token; use a tokenizer whose decoder replaces plain strings."
                )
            yield part["pattern"]["String"], part["content"]


def _stands_alone(text: str) -> bool:
    """Tell whether WordPiece always separates these characters: punctuation, symbols and ideographs."""
    return all(unicodedata.category(character)[0] in "PSCZ" or _is_ideograph(character) for character in text)


def _is_ideograph(character: str) -> bool:
    code = ord(character)
    return 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x2FA1F
