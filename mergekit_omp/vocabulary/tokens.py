"""Read vocabularies in canonical form: every token with its bytes, so that vocabularies can be compared."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import repeat
from typing import NamedTuple

from transformers import AddedToken, PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.vocabulary.byte_encoding import as_text, name_of, read_scheme
from mergekit_omp.vocabulary.special import is_unused_text

# The order in which a token of several roles is matched: models learn the end of a text best.
TRAINED_ROLES = ("eos", "bos", "sep", "cls", "mask")
UNTRAINED_ROLES = ("unk", "pad")
ROLES = TRAINED_ROLES + UNTRAINED_ROLES

_MARKS_END = (">", "]")
"""The ends of all strings of unused and byte-fallback tokens."""

LARGEST_GAP = 2**20
"""Number of ids without a token above which an id is certainly wrong; real vocabularies have some thousands."""


class TokenKind(str, Enum):
    """The purpose of a token."""

    ORDINARY = "ordinary"  # text, including added tokens that are not special
    BYTE = "byte"  # a byte-fallback token such as <0x0A>
    SPECIAL = "special"  # a control token, which no text encodes to
    UNUSED = "unused"  # reserved for later use, such as <unused12>; never trained


class Token(NamedTuple):
    """One token; a tuple, of which hundreds of thousands are made quickly.

    Attributes:
        id: its row in the embedding matrix.
        text: as in ``tokenizer.get_vocab()``.
        data: its bytes when decoded; the UTF-8 of its text if it is special or unused.
        kind: its purpose.
        added: whether it is an added token, which tokenizers split off before anything else.
    """

    id: int
    text: str
    data: bytes
    kind: TokenKind
    added: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it stands for bytes of texts, as ordinary and byte-fallback tokens do."""
        return self.kind in (TokenKind.ORDINARY, TokenKind.BYTE)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer's tokens by id, and the tokens with a role. Compared and hashed by ``fingerprint``.

    Attributes:
        tokens: token of each id; ids may have gaps.
        roles: id of each role that is set, out of "bos", "eos", "pad", "unk", "mask", "sep" and "cls".
    """

    tokens: Mapping[int, Token] = field(repr=False)
    roles: Mapping[str, int]

    @cached_property
    def size(self) -> int:
        """The largest id + 1: the number of rows that an embedding needs."""
        return max(self.tokens, default=-1) + 1

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of everything that affects matching, as hexadecimal digits."""
        digest = hashlib.sha256(repr(sorted(self.roles.items())).encode())
        names = {kind: kind.value for kind in TokenKind}
        tokens = map(self.tokens.__getitem__, sorted(self.tokens))
        rows = ((id_, text, data, names[kind], added) for id_, text, data, kind, added in tokens)
        digest.update("".join(map(repr, rows)).encode())
        return digest.hexdigest()

    @cached_property
    def ids_by_bytes(self) -> Mapping[bytes, int]:
        """The id of the bytes of each text token; an ordinary token comes before a byte-fallback token."""
        last_first = list(self.tokens.values())[::-1]  # of several tokens with the same bytes, the first counts
        byte, ordinary = (
            {token.data: token.id for token in last_first if token.kind is kind}
            for kind in (TokenKind.BYTE, TokenKind.ORDINARY)
        )
        return byte | ordinary

    @cached_property
    def named(self) -> Sequence[Token]:
        """The tokens that are not plain text: added, special, unused or byte-fallback tokens, in order."""
        return [token for token in self.tokens.values() if token.added or token.kind is not TokenKind.ORDINARY]

    def truncated(self, rows: int) -> "Vocabulary":
        """Return the vocabulary without tokens and roles whose id is ``rows`` or more."""
        if rows >= self.size:
            return self
        return Vocabulary(
            tokens={id_: token for id_, token in self.tokens.items() if id_ < rows},
            roles={role: id_ for role, id_ in self.roles.items() if id_ < rows},
        )

    def free_rows(self, rows: int) -> list[int]:
        """Return those of the first ``rows`` rows that no text ever uses: of unused tokens, and without a token."""
        return [i for i in range(rows) if i not in self.tokens or self.tokens[i].kind is TokenKind.UNUSED]

    def __eq__(self, other: object) -> bool:
        """Compare the fingerprints."""
        return isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        """Hash the fingerprint."""
        return hash(self.fingerprint)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Read the tokens of a tokenizer with their bytes.

    Args:
        tokenizer: slow or fast tokenizer of transformers; not modified.

    Returns:
        The tokens by id, and the ids of the tokens with a role.

    Raises:
        OmpError: if the tokenizer's kind is unknown, it has no tokens, or an id is absurd or of two tokens.

    Example:
        >>> from mergekit_omp import read_vocabulary
        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.BPE(vocab={"Ġ": 0, "a": 1, "Ġa": 2}, merges=[("Ġ", "a")]))
        >>> backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        >>> vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
        >>> [token.data for token in vocabulary.tokens.values()]
        [b' ', b'a', b' a']
    """
    scheme = read_scheme(tokenizer)
    added = tokenizer.added_tokens_decoder
    texts = _texts_by_id(tokenizer, added)
    if not texts:
        raise OmpError(f"The tokenizer {name_of(tokenizer)} has no tokens; name a tokenizer that has some.")
    last = max(texts)
    if last > len(texts) + LARGEST_GAP:
        raise OmpError(
            f"The tokenizer {name_of(tokenizer)} has {len(texts)} tokens, but gives {texts[last]!r} the id {last}, "
            "so that an embedding would need as many rows; download the tokenizer again."
        )
    roles = _roles(tokenizer, texts)
    with_role = set(roles.values())
    special = {id_ for id_, token in added.items() if token.special} | with_role | _control_pieces(tokenizer)

    named = added.keys() | special

    def read_token(id_: int, text: str) -> Token:
        if id_ not in with_role and is_unused_text(text):
            return Token(id_, text, _utf8(text), TokenKind.UNUSED, id_ in added)
        if scheme.fallback_byte(text) is not None and id_ not in with_role:  # even if it is flagged as special
            return Token(id_, text, scheme.ordinary_bytes(text), TokenKind.BYTE, id_ in added)
        if id_ in special:
            return Token(id_, text, _utf8(text), TokenKind.SPECIAL, id_ in added)
        if id_ in added:
            return Token(id_, text, scheme.added_bytes(text), TokenKind.ORDINARY, added=True)
        return Token(id_, text, scheme.ordinary_bytes(text), TokenKind.ORDINARY)

    plain = [id_ for id_, text in texts.items() if id_ not in named and not text.endswith(_MARKS_END)]
    plain_texts = list(map(texts.__getitem__, plain))
    columns = zip(plain, plain_texts, scheme.bytes_of_all(plain_texts), repeat(TokenKind.ORDINARY), repeat(False))
    tokens = dict(zip(plain, map(Token._make, columns), strict=True))
    tokens |= {id_: read_token(id_, texts[id_]) for id_ in texts.keys() - tokens.keys()}
    return Vocabulary({id_: tokens[id_] for id_ in sorted(tokens)}, roles)


def _texts_by_id(tokenizer: PreTrainedTokenizerBase, added: Mapping[int, AddedToken]) -> dict[int, str]:
    """Return the string of every id; added tokens override the vocabulary of the tokenizer model.

    Bytes, as in vocabularies of tiktoken's kind, become strings of the byte-level alphabet.

    Raises:
        OmpError: if two tokens of the tokenizer's model have one id.
    """
    vocabulary = tokenizer.get_vocab()
    texts = {id_: text if isinstance(text, str) else as_text(text) for text, id_ in vocabulary.items()}
    if len(texts) < len(vocabulary):
        _check_ids(tokenizer, vocabulary, added)
    texts.update((id_, token.content) for id_, token in added.items())
    return texts


def _check_ids(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int], added: Mapping[int, AddedToken]
) -> None:
    """Raise an OmpError for an id of two tokens, of which one would be lost when the tokenizer is saved."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        own = {text: id_ for text, id_ in vocabulary.items() if id_ not in added}
    else:
        own = backend.get_vocab(with_added_tokens=False)  # an added token may replace one of these
    texts: dict[int, str] = {}
    for text, id_ in sorted((as_text(text), id_) for text, id_ in own.items()):  # a vocabulary has no fixed order
        other = texts.setdefault(id_, text)
        if other != text:
            raise OmpError(
                f"The tokenizer {name_of(tokenizer)} gives {other!r} and {text!r} the same id, {id_}; download the "
                "tokenizer again."
            )


def _roles(tokenizer: PreTrainedTokenizerBase, texts: Mapping[int, str]) -> dict[str, int]:
    """Return the id of each role's token that is set and in the vocabulary.

    Looks up the token's string, since ``bos_token_id`` of a missing string is the id of the unknown token.
    """
    named = {role: getattr(tokenizer, f"{role}_token", None) for role in ROLES}
    wanted = {role: str(text) for role, text in named.items() if text is not None}
    strings = set(wanted.values())
    ids = {text: id_ for id_, text in texts.items() if text in strings}
    return {role: ids[text] for role, text in wanted.items() if text in ids}


def _control_pieces(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that a SentencePiece model declares as control or unknown pieces."""
    pieces = getattr(tokenizer, "sp_model", None)
    if pieces is None:
        return set()
    return {id_ for id_ in range(pieces.get_piece_size()) if pieces.is_control(id_) or pieces.is_unknown(id_)}


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
