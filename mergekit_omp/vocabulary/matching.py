"""Match the tokens of the output vocabulary with the rows of a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from mergekit_omp.vocabulary.special import equivalents_of, is_html, meaning_of
from mergekit_omp.vocabulary.tokens import TRAINED_ROLES, UNTRAINED_ROLES, Token, TokenKind, Vocabulary


class MatchReason(IntEnum):
    """Why an output id has its row, or has none."""

    NO_TOKEN = 0  # the id is a gap of the output vocabulary: no row
    SAME_STRING = 1
    SAME_BYTES = 2  # other strings for the same bytes, such as "Ġthe" and "▁the"
    BYTE_TOKEN = 3  # the same single byte, one side as a byte-fallback token
    SPECIAL_CONTENT = 4  # the same string, special in both vocabularies
    SPECIAL_ROLE = 5  # both are the bos, eos, … of their tokenizer
    SPECIAL_EQUIVALENT = 6  # the built-in table says that they mean the same
    UNUSED = 7  # reserved for later use; has a row only if the model has the same unused token
    MISSING = 8  # text without a token of the model: no row
    MISSING_SPECIAL = 9  # a special token without a counterpart: no row
    DUPLICATE = 10  # the output tokenizer always writes another token for the same bytes: no row
    SPECIAL_RENAMED = 11  # same id and role, another name, in otherwise equal vocabularies


# Text matched with text: these anchors serve as atoms.
TEXT_REASONS = (MatchReason.SAME_STRING, MatchReason.SAME_BYTES, MatchReason.BYTE_TOKEN)
NEW_REASONS = (MatchReason.MISSING, MatchReason.MISSING_SPECIAL)

SAME_VOCABULARY = 0.99
"""Share of equal text tokens, among ids that are text in both, above which two vocabularies count as the same."""

FEWEST_TEXT = 100
"""Number of common text tokens below which equal ones may be coincidence; every real vocabulary has more."""


@dataclass(frozen=True)
class VocabularyMatch:
    """The match of an output vocabulary with a model's vocabulary.

    Attributes:
        rows: int64 (V,), the model's row for each of the V output ids, -1 for none.
        reasons: int8 (V,), the ``MatchReason`` of each output id.
    """

    rows: torch.Tensor
    reasons: torch.Tensor

    def counts(self) -> dict[MatchReason, int]:
        """Count the output ids of each reason; reasons without ids are omitted."""
        counted = torch.bincount(self.reasons.long(), minlength=len(MatchReason)).tolist()
        return {reason: counted[reason] for reason in MatchReason if counted[reason]}

    def is_text(self) -> torch.Tensor:
        """Return bool (V,): whether an output id is text and has a row."""
        return torch.isin(self.reasons, torch.tensor(TEXT_REASONS, dtype=torch.int8))

    def is_new(self) -> torch.Tensor:
        """Return bool (V,): whether an output id is a new token, which the model has no row for.

        Unused tokens are not new tokens: there is nothing to approximate.
        """
        return torch.isin(self.reasons, torch.tensor(NEW_REASONS, dtype=torch.int8))

    def without(self, ids: torch.Tensor, reason: MatchReason = MatchReason.MISSING) -> "VocabularyMatch":
        """Return the match without the rows of the output ids int64 (I,), with ``reason`` for them."""
        rows, reasons = self.rows.clone(), self.reasons.clone()
        rows[ids], reasons[ids] = -1, int(reason)
        return VocabularyMatch(rows, reasons)

    def atoms(self) -> torch.Tensor:
        """Return the output ids that serve as atoms: int64 (N,), ascending, one per row of the model.

        Special and unused tokens are excluded, since their rows do not represent text. If several output tokens have
        one row, the best match counts: same string, then same bytes, then byte token, then the smallest id.
        """
        ids = torch.nonzero(self.is_text()).flatten()
        best_first = ids[torch.argsort(self.reasons[ids], stable=True)]
        id_of_row: dict[int, int] = {}
        for id_, row in zip(best_first.tolist(), self.rows[best_first].tolist(), strict=True):
            id_of_row.setdefault(row, id_)
        return torch.tensor(sorted(id_of_row.values()), dtype=torch.int64)


def match_vocabularies(output: Vocabulary, model: Vocabulary) -> VocabularyMatch:
    """Match every token of the output vocabulary with a row of a model.

    Text matches text by its bytes: every output token whose bytes the model has gets a row, even if several have the
    same bytes. Among the model's tokens with these bytes, the one with the same string is preferred, then an ordinary
    token, then a byte-fallback token. Special tokens match special tokens, in this order: the same string; the same id
    and role in vocabularies that differ in renamed special tokens only; the same role; the table of equivalents; and
    last the unknown or padding token, whose rows carry little information. Text never matches a special token, except
    that a control token of the table may be declared special by one tokenizer and merely added by another.
    ``match_vocabularies(v, v)`` is the identity.

    Args:
        output: vocabulary of the output tokenizer, with V ids.
        model: vocabulary of the model that rows are taken from, truncated to the rows that the model has.

    Returns:
        The rows int64 (V,) and the reasons int8 (V,).

    Example:
        >>> from mergekit_omp import match_vocabularies
        >>> from mergekit_omp.vocabulary.matching import MatchReason
        >>> from mergekit_omp.vocabulary.tokens import Token, TokenKind, Vocabulary
        >>> output = Vocabulary(
        ...     {id_: Token(id_, text, data, TokenKind.ORDINARY)
        ...      for id_, (text, data) in enumerate([("Ġthe", b" the"), ("Ġnew", b" new")])}, roles={})
        >>> model = Vocabulary({7: Token(7, "▁the", b" the", TokenKind.ORDINARY)}, roles={})
        >>> match = match_vocabularies(output, model)
        >>> match.rows.tolist()
        [7, -1]
        >>> MatchReason(int(match.reasons[0])).name
        'SAME_BYTES'
        >>> match.is_new().tolist(), match.atoms().tolist()
        ([False, True], [0])
    """
    if output is model and len({token.text for token in output.tokens.values()}) == len(output.tokens):
        return _identity(output)
    finder = _RowFinder(output, model)
    same = finder.find_strings(output.tokens.values())
    others = {id_: finder.find(token) for id_, token in output.tokens.items() if id_ not in same}
    rows = np.full(output.size, -1)
    reasons = np.full(output.size, MatchReason.NO_TOKEN, dtype=np.int8)
    ids = np.fromiter(same, np.int64, len(same))
    rows[ids], reasons[ids] = np.fromiter(same.values(), np.int64, len(same)), MatchReason.SAME_STRING
    for id_, (row, reason) in others.items():
        rows[id_], reasons[id_] = row, reason
    return VocabularyMatch(torch.from_numpy(rows), torch.from_numpy(reasons))


def _identity(vocabulary: Vocabulary) -> VocabularyMatch:
    """Match a vocabulary in which no two tokens have one string with itself."""
    rows = torch.full((vocabulary.size,), -1)
    reasons = torch.full((vocabulary.size,), int(MatchReason.NO_TOKEN), dtype=torch.int8)
    ids = torch.tensor(list(vocabulary.tokens), dtype=torch.int64)
    rows[ids], reasons[ids] = ids, int(MatchReason.SAME_STRING)
    for token in vocabulary.named:
        if token.kind is TokenKind.SPECIAL:
            reasons[token.id] = int(MatchReason.SPECIAL_CONTENT)
        elif token.kind is TokenKind.UNUSED:
            reasons[token.id] = int(MatchReason.UNUSED)
    return VocabularyMatch(rows, reasons)


class _RowFinder:
    """Look-up of a model's rows for output tokens."""

    def __init__(self, output: Vocabulary, model: Vocabulary) -> None:
        self._output_roles = output.roles
        self._model_roles = model.roles
        self._renamed = _renamed_tokens(output, model)
        tokens = sorted(model.tokens.values())  # by id
        self._text = _TextIndex([token for token in tokens if token.is_text])
        named = sorted(model.named)
        self._special = _rows_by_text(token for token in named if token.kind is TokenKind.SPECIAL)
        self._unused = _rows_by_text(token for token in named if token.kind is TokenKind.UNUSED)
        self._control = _rows_by_text(token for token in named if is_control(token))

    def find_strings(self, tokens: Iterable[Token]) -> dict[int, int]:
        """Return the row of each id whose string and bytes the model has as text: of most tokens, found at once."""
        return self._text.find_strings(token for token in tokens if token.is_text)

    def find(self, token: Token) -> tuple[int, MatchReason]:
        """Return the row, or -1, and the reason."""
        if token.kind is TokenKind.UNUSED:
            return self._unused.get(token.text, -1), MatchReason.UNUSED
        if token.kind is TokenKind.SPECIAL:
            return self._find_special(token)
        found = self._text.find(token)
        if found is None and is_control(token):
            found = self._find_equivalent(token)
        return found or (-1, MatchReason.MISSING)

    def _find_special(self, token: Token) -> tuple[int, MatchReason]:
        if token.text in self._special:
            return self._special[token.text], MatchReason.SPECIAL_CONTENT
        if token.id in self._renamed:
            return token.id, MatchReason.SPECIAL_RENAMED
        return (
            self._find_role(token, TRAINED_ROLES)
            or self._find_equivalent(token)
            or self._find_untrained_role(token)
            or (-1, MatchReason.MISSING_SPECIAL)
        )

    def _find_role(self, token: Token, roles: Iterable[str]) -> tuple[int, MatchReason] | None:
        for role in roles:
            if self._output_roles.get(role) == token.id and role in self._model_roles:
                return self._model_roles[role], MatchReason.SPECIAL_ROLE
        return None

    def _find_untrained_role(self, token: Token) -> tuple[int, MatchReason] | None:
        """Match as unknown or padding token, unless the token has a trained role too, such as eos used for padding."""
        if any(self._output_roles.get(role) == token.id for role in TRAINED_ROLES):
            return None
        return self._find_role(token, UNTRAINED_ROLES)

    def _find_equivalent(self, token: Token) -> tuple[int, MatchReason] | None:
        for text in (token.text, *equivalents_of(token.text)):
            if text in self._control:
                return self._control[text], MatchReason.SPECIAL_EQUIVALENT
        return None


class _TextIndex:
    """A model's ordinary and byte tokens, indexed by their bytes; of several with the same, the first counts."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        last_first = tokens[::-1]
        self._ordinary = {token.data: token for token in last_first if token.kind is TokenKind.ORDINARY}
        self._byte = {token.data: token for token in last_first if token.kind is TokenKind.BYTE}
        first = self._ordinary.get
        self._others = {(token.text, token.data): token for token in last_first if first(token.data) is not token}

    def find_strings(self, tokens: Iterable[Token]) -> dict[int, int]:
        """Return the row of each id whose string is that of the first ordinary token with its bytes."""
        first = self._ordinary.get
        return {
            token.id: found.id
            for token in tokens
            if (found := first(token.data)) is not None and found.text == token.text
        }

    def find(self, token: Token) -> tuple[int, MatchReason] | None:
        ordinary, other = self._ordinary.get(token.data), self._others.get((token.text, token.data))
        if ordinary is not None and ordinary.text == token.text:
            return ordinary.id, MatchReason.SAME_STRING
        if other is not None:
            return other.id, MatchReason.SAME_STRING
        if ordinary is not None:
            return ordinary.id, MatchReason.BYTE_TOKEN if token.kind is TokenKind.BYTE else MatchReason.SAME_BYTES
        byte = self._byte.get(token.data)
        return None if byte is None else (byte.id, MatchReason.BYTE_TOKEN)


def _renamed_tokens(output: Vocabulary, model: Vocabulary) -> set[int]:
    """Find special tokens that differ in name only, as DeepSeek-R1-Distill-Qwen renamed those of Qwen.

    The vocabularies must otherwise be equal, neither may contain the other's name, and the two tokens must agree: a
    role in common, or roles that the other vocabulary assigns to no token, and no two different meanings.
    """
    if output is model or not _same_text(output, model):
        return set()
    names = [{token.text for token in vocabulary.tokens.values()} for vocabulary in (output, model)]
    special = (
        token.id
        for token in output.named
        if token.id in model.tokens and token.kind is model.tokens[token.id].kind is TokenKind.SPECIAL
    )
    return {
        id_
        for id_ in special
        if model.tokens[id_].text not in names[0]
        and output.tokens[id_].text not in names[1]
        and _agree(id_, output, model)
    }


def _same_text(output: Vocabulary, model: Vocabulary) -> bool:
    """Tell whether nearly all tokens of one id that are text in two vocabularies are equal."""
    common = equal = 0
    most_unequal = len(output.tokens) * (1 - SAME_VOCABULARY) + 1
    for id_, one in output.tokens.items():
        other = model.tokens.get(id_)
        if other is not None and one.is_text and other.is_text:
            common += 1
            equal += one.text == other.text
            if common - equal > most_unequal:
                return False  # whatever the others are
    return common >= FEWEST_TEXT and equal >= SAME_VOCABULARY * common


def _agree(id_: int, output: Vocabulary, model: Vocabulary) -> bool:
    """Tell whether the declared roles and meanings of an id do not contradict each other in two vocabularies."""
    output_roles, model_roles = (
        {role for role, role_id in vocabulary.roles.items() if role_id == id_} for vocabulary in (output, model)
    )
    if output_roles & model_roles:
        return True
    meanings = {meaning_of(vocabulary.tokens[id_].text) for vocabulary in (output, model)} - {None}
    exclusive = output_roles.isdisjoint(model.roles) and model_roles.isdisjoint(output.roles)
    return bool(output_roles | model_roles) and exclusive and len(meanings) < 2


def is_control(token: Token) -> bool:
    """Tell whether a token is a control token of the table of equivalents, and not text with the same string."""
    if token.kind is TokenKind.SPECIAL:
        return meaning_of(token.text) is not None
    return (
        token.added
        and token.kind is TokenKind.ORDINARY
        and meaning_of(token.text) is not None
        and not is_html(token.text)
    )


def _rows_by_text(tokens: Iterable[Token]) -> Mapping[str, int]:
    rows: dict[str, int] = {}
    for token in tokens:
        rows.setdefault(token.text, token.id)
    return rows
