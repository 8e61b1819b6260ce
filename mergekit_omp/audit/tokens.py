"""Checks of a tokenizer: what it can write, what it cuts out of a text, and whether it gives a text back."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from mergekit_omp.audit.scripts import SCRIPTS
from mergekit_omp.report.samples import readable
from mergekit_omp.vocabulary.segmentation import text_encoder, text_of
from mergekit_omp.vocabulary.special import is_html, table
from mergekit_omp.vocabulary.tokens import Token, TokenKind, Vocabulary

FIRST = 20
"""Tokens of each kind that a record names."""

_LINES = 128
"""Tokens of one text: fewer texts are encoded faster, and in longer ones the merges of SentencePiece are slow."""

_CONTEXTS = ("{}", "a{}", "{}a", "a{}a", " {}", "{} ", ".{}", "{}.", "1{}", "{}1", "{}\n", "\n{}")


@dataclass(frozen=True)
class TokenChecks:
    """What is odd about a tokenizer.

    Attributes:
        unreachable: tokens of the model's own vocabulary that it makes of no text.
        control: added tokens with a chat control string in them, which a text can hold where they are not special.
        changed_scripts: the scripts of which a text is not given back by encoding and decoding it.
    """

    unreachable: tuple[Token, ...]
    control: tuple[Token, ...]
    changed_scripts: tuple[str, ...]

    def counts(self) -> dict[str, Any]:
        """Return the counts with the first tokens, for the record of a run."""
        return {
            "unreachable": _count(self.unreachable),
            "control_strings": _count(self.control),
            "scripts": len(SCRIPTS),
            "changed_scripts": list(self.changed_scripts),
        }


def _count(tokens: Sequence[Token]) -> dict[str, Any]:
    return {"count": len(tokens), "first": [{"id": token.id, "token": readable(token)} for token in tokens[:FIRST]]}


def check_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> TokenChecks:
    """Check a tokenizer.

    Args:
        tokenizer: left as it is.
        vocabulary: its vocabulary.
    """
    return TokenChecks(
        tuple(_unreachable(tokenizer, vocabulary)),
        tuple(token for token in vocabulary.named if token.added and _holds_control(token)),
        tuple(name for name, text in SCRIPTS.items() if not _is_given_back(text, tokenizer)),
    )


def _unreachable(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> Iterator[Token]:
    """Tokens that the tokenizer makes of no text: not of many tokens' texts, and not of their own in any context.

    Within a token's text the merges are the same whatever stands around it, so that a few contexts, which are there
    for the pre-tokenizer, suffice. Of tokens that are no text, BPE's merges are asked.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    ordinary = [
        token
        for token in vocabulary.tokens.values()
        if token.kind is TokenKind.ORDINARY and not token.added and (len(token.data) > 1 or text_of(token.data))
    ]
    texts = {token.id: text for token in ordinary if (text := text_of(token.data)) is not None}
    encode = text_encoder(tokenizer, vocabulary)
    lines = list(texts.values())
    found = set().union(*encode(["\n".join(lines[n : n + _LINES]) for n in range(0, len(lines), _LINES)]))
    left = texts
    for context in _CONTEXTS:
        left = {id_: text for id_, text in left.items() if id_ not in found}
        found.update(*encode([context.replace("{}", text) for text in left.values()]))
    found.update(_merged(backend.model, [token for token in ordinary if token.id not in texts]))
    for token in ordinary:
        if token.id not in found:
            yield token


def _merged(model: models.Model, tokens: Sequence[Token]) -> set[int]:
    """Return the ids of the tokens that BPE's merges make of their own bytes; of all tokens for another model."""
    if not isinstance(model, models.BPE):
        return {token.id for token in tokens}
    ignores, model.ignore_merges = model.ignore_merges, False
    try:
        encoded = Tokenizer(model).encode_batch_fast([token.text for token in tokens], add_special_tokens=False)
    finally:
        model.ignore_merges = ignores
    return {token.id for token, encoding in zip(tokens, encoded, strict=True) if token.id in encoding.ids}


def _holds_control(token: Token) -> bool:
    """Whether an added token has a control string in it, other than a special token that is just that string."""
    found = _control_pattern().search(token.text)
    if found is None or is_html(token.text):
        return False
    return token.kind is not TokenKind.SPECIAL or found.group() != token.text


@cache
def _control_pattern() -> re.Pattern[str]:
    listed = {text for texts in table()["equivalents"].values() for text in texts if not is_html(text)}
    longest_first = sorted(listed, key=lambda text: (-len(text), text))
    return re.compile("|".join([*map(re.escape, longest_first), r"<[|｜][^<>\s|｜]+[|｜]>"]))


def _is_given_back(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding and decoding gives a text back, but for a space before it."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return decoded in (text, f" {text}")
