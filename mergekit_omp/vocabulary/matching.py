"""Which row of a model each token of the output vocabulary has."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch

from mergekit_omp.vocabulary.special import equivalents_of, is_html, meaning_of
from mergekit_omp.vocabulary.tokens import TRAINED_ROLES, UNTRAINED_ROLES, Token, TokenKind, Vocabulary


class MatchReason(IntEnum):
    """Why an output id has the row that it has, or has none."""

    NO_TOKEN = 0  # the id is a gap of the output vocabulary: no row
    SAME_STRING = 1
    SAME_BYTES = 2  # other strings for the same bytes, such as "Ġthe" and "▁the"
    BYTE_TOKEN = 3  # the same single byte, one side as a byte-fallback token
    SPECIAL_CONTENT = 4  # special on both sides, and the same string
    SPECIAL_ROLE = 5  # both are the bos, eos, … of their tokenizer
    SPECIAL_EQUIVALENT = 6  # the built-in table says that they mean the same
    UNUSED = 7  # kept free for later use; has a row only where the model keeps the same string free
    MISSING = 8  # text that the model has no token for: no row
    MISSING_SPECIAL = 9  # a special token without a counterpart: no row
    DUPLICATE = 10  # the output tokenizer always writes another token for the same bytes: no row
    SPECIAL_RENAMED = 11  # same id and role under another name, in vocabularies that are otherwise the same


# Text that pairs with text: these are the anchors that serve as atoms.
TEXT_REASONS = (MatchReason.SAME_STRING, MatchReason.SAME_BYTES, MatchReason.BYTE_TOKEN)
NEW_REASONS = (MatchReason.MISSING, MatchReason.MISSING_SPECIAL)

SAME_VOCABULARY = 0.99
"""Share of equal text tokens, among the ids that two vocabularies both have text for, that makes them one."""

FEWEST_TEXT = 100
"""Text tokens in common below which equal ones may be chance; every real vocabulary has more."""


@dataclass(frozen=True)
class VocabularyMatch:
    """The match of an output vocabulary with a model's own.

    Attributes:
        rows: int64 [V], the model's row for each output id, -1 where it has none.
        reasons: int8 [V], the ``MatchReason`` of each output id.

    V: the output vocabulary's size.
    """

    rows: torch.Tensor
    reasons: torch.Tensor

    def counts(self) -> dict[MatchReason, int]:
        """How many output ids there are of each reason, those of none left out."""
        counted = torch.bincount(self.reasons.long(), minlength=len(MatchReason)).tolist()
        return {reason: counted[reason] for reason in MatchReason if counted[reason]}

    def is_text(self) -> torch.Tensor:
        """Boolean [V]: the output ids that are text and have a row."""
        return torch.isin(self.reasons, torch.tensor(TEXT_REASONS, dtype=torch.int8))

    def is_new(self) -> torch.Tensor:
        """Boolean [V]: the output tokens that the model has no row for and that mean something.

        Tokens that are kept free for later use are not among them: there is nothing to approximate.
        """
        return torch.isin(self.reasons, torch.tensor(NEW_REASONS, dtype=torch.int8))

    def without(self, ids: torch.Tensor, reason: MatchReason = MatchReason.MISSING) -> "VocabularyMatch":
        """The match as if the model had no token for these output ids, int64 [I], for a reason."""
        rows, reasons = self.rows.clone(), self.reasons.clone()
        rows[ids], reasons[ids] = -1, int(reason)
        return VocabularyMatch(rows, reasons)

    def atoms(self) -> torch.Tensor:
        """The output ids that serve as atoms: int64 [A], ascending, one for each row of the model.

        Special and unused tokens are no atoms, since what they embed is not text. Of several output tokens that stand
        for one row the best match counts: same string, then same bytes, then byte token, then the smallest id.
        """
        ids = torch.nonzero(self.is_text()).flatten()
        best_first = ids[torch.argsort(self.reasons[ids], stable=True)]
        seen: dict[int, int] = {}
        for id_, row in zip(best_first.tolist(), self.rows[best_first].tolist(), strict=True):
            seen.setdefault(row, id_)
        return torch.tensor(sorted(seen.values()), dtype=torch.int64)


def match_vocabularies(output: Vocabulary, model: Vocabulary) -> VocabularyMatch:
    """Find the row of a model for every token of the output vocabulary that the model has.

    Text pairs with text by its bytes: every output token whose bytes the model has gets a row, also where several have
    the same. Among the model's tokens with those bytes, the one of the same string is taken, else an ordinary one
    before a byte-fallback one. Special tokens pair with special tokens: the same string first, then the same id and
    role where the vocabularies are one but for renamed special tokens, then the same role, then by the table of
    equivalents, and only then as unknown or padding token, whose rows mean little. Text never pairs with them,
    save that one tokenizer may declare a control token of the table as special and another as merely added.
    ``match_vocabularies(v, v)`` is the identity.

    Args:
        output: the output tokenizer's vocabulary.
        model: the vocabulary of the model that rows are taken from; truncated to the rows that it has.

    Returns:
        ``rows`` int64 (V,) and ``reasons`` int8 (V,) for the V ids of the output vocabulary.

    Example:
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
    rows, reasons = [-1] * output.size, [int(MatchReason.NO_TOKEN)] * output.size
    finder = _RowFinder(output, model)
    for token in output.tokens.values():
        rows[token.id], reasons[token.id] = finder.find(token)
    return VocabularyMatch(torch.tensor(rows, dtype=torch.int64), torch.tensor(reasons, dtype=torch.int8))


class _RowFinder:
    """Looks up a model's row for one output token at a time."""

    def __init__(self, output: Vocabulary, model: Vocabulary) -> None:
        self._output_roles = output.roles
        self._model_roles = model.roles
        self._renamed = _renamed_tokens(output, model)
        tokens = sorted(model.tokens.values(), key=lambda token: token.id)
        self._text = _TextIndex(token for token in tokens if token.kind in (TokenKind.ORDINARY, TokenKind.BYTE))
        self._special = _rows_by_text(token for token in tokens if token.kind is TokenKind.SPECIAL)
        self._unused = _rows_by_text(token for token in tokens if token.kind is TokenKind.UNUSED)
        self._control = _rows_by_text(token for token in tokens if is_control(token))

    def find(self, token: Token) -> tuple[int, MatchReason]:
        """The row, or -1, and the reason."""
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
        """Pair as unknown or padding token; not an end of text that serves as padding too, which is well trained."""
        if any(self._output_roles.get(role) == token.id for role in TRAINED_ROLES):
            return None
        return self._find_role(token, UNTRAINED_ROLES)

    def _find_equivalent(self, token: Token) -> tuple[int, MatchReason] | None:
        for text in (token.text, *equivalents_of(token.text)):
            if text in self._control:
                return self._control[text], MatchReason.SPECIAL_EQUIVALENT
        return None


class _TextIndex:
    """A model's ordinary and byte tokens by the bytes that they stand for."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._same_string: dict[tuple[str, bytes], int] = {}
        self._ordinary: dict[bytes, int] = {}
        self._byte: dict[bytes, int] = {}
        for token in tokens:
            self._same_string.setdefault((token.text, token.data), token.id)
            by_bytes = self._byte if token.kind is TokenKind.BYTE else self._ordinary
            by_bytes.setdefault(token.data, token.id)

    def find(self, token: Token) -> tuple[int, MatchReason] | None:
        row = self._same_string.get((token.text, token.data))
        if row is not None:
            return row, MatchReason.SAME_STRING
        row = self._ordinary.get(token.data)
        if row is not None:
            return row, MatchReason.BYTE_TOKEN if token.kind is TokenKind.BYTE else MatchReason.SAME_BYTES
        row = self._byte.get(token.data)
        return None if row is None else (row, MatchReason.BYTE_TOKEN)


def _renamed_tokens(output: Vocabulary, model: Vocabulary) -> set[int]:
    """The ids of special tokens that differ in name alone: DeepSeek-R1-Distill-Qwen renamed Qwen's.

    Both vocabularies must be one but for such tokens, neither may have the other's name, and what is known of the two
    tokens must agree: a role in common, or roles that the other vocabulary gives to no token, and no two meanings.
    """
    common = output.tokens.keys() & model.tokens.keys()
    text = [id_ for id_ in common if _is_text(output.tokens[id_]) and _is_text(model.tokens[id_])]
    equal = sum(output.tokens[id_].text == model.tokens[id_].text for id_ in text)
    if len(text) < FEWEST_TEXT or equal < SAME_VOCABULARY * len(text):
        return set()
    names = [{token.text for token in vocabulary.tokens.values()} for vocabulary in (output, model)]
    special = (id_ for id_ in common if output.tokens[id_].kind is model.tokens[id_].kind is TokenKind.SPECIAL)
    return {
        id_
        for id_ in special
        if model.tokens[id_].text not in names[0]
        and output.tokens[id_].text not in names[1]
        and _agree(id_, output, model)
    }


def _is_text(token: Token) -> bool:
    return token.kind in (TokenKind.ORDINARY, TokenKind.BYTE)


def _agree(id_: int, output: Vocabulary, model: Vocabulary) -> bool:
    """Whether an id has one role in two vocabularies, as far as they say."""
    ours, its = ({role for role, own in vocabulary.roles.items() if own == id_} for vocabulary in (output, model))
    if ours & its:
        return True
    meanings = {meaning_of(vocabulary.tokens[id_].text) for vocabulary in (output, model)} - {None}
    return bool(ours | its) and ours.isdisjoint(model.roles) and its.isdisjoint(output.roles) and len(meanings) < 2


def is_control(token: Token) -> bool:
    """Whether the table of equivalents speaks of this token: a listed string, and not just text that reads alike."""
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
