"""Find the special tokens that a tokenizer's chat template uses."""

import logging
import re
from collections.abc import Iterator
from functools import cache

from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.matching import is_control
from mergekit_omp.vocabulary.special import table
from mergekit_omp.vocabulary.tokens import ROLES, TokenKind, Vocabulary

LOG = logging.getLogger(__name__)

_CONVERSATIONS = (
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
)


def chat_template_tokens(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, template: str | dict[str, str] | None
) -> set[int]:
    """Find the special tokens that a chat template writes.

    Both the template's source and its rendering of two short conversations are searched, since templates concatenate
    strings (``'<|' + role + '|>'``) and refer to tokens by role (``bos_token``).

    Args:
        tokenizer: tokenizer that renders the template.
        vocabulary: its vocabulary.
        template: the template, or several by name; None has no tokens.

    Returns:
        Their ids in the vocabulary.
    """
    text = "\n".join(_texts(tokenizer, template or {}))
    found = {
        token.id
        for token in vocabulary.named
        if (token.kind in (TokenKind.SPECIAL, TokenKind.UNUSED) or is_control(token)) and token.text in text
    }
    return found | {vocabulary.roles[role] for role in ROLES if role in vocabulary.roles and f"{role}_token" in text}


def absent_chat_tokens(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, template: str | dict[str, str] | None
) -> list[str]:
    """Find control tokens that a chat template writes but the vocabulary lacks, so that they are tokenised as text.

    These are strings between ``<|`` and ``|>``, and strings that the table of equivalents lists for texts and turns,
    but not tags such as ``<tools>``, which templates write as text on purpose.

    Args:
        tokenizer: tokenizer that renders the template.
        vocabulary: its vocabulary.
        template: the template, or several by name; None has no tokens.

    Returns:
        Their strings, in alphabetical order.
    """
    written = set(_control_pattern().findall("\n".join(_texts(tokenizer, template or {}))))
    return sorted(written - {token.text for token in vocabulary.tokens.values()}) if written else []


_MEANINGS = (
    "begin_of_text",
    "end_of_text",
    "start_of_turn",
    "end_of_header",
    "end_of_turn",
    "end_of_message",
    "system_turn",
    "user_turn",
    "assistant_turn",
    "observation_turn",
)


@cache
def _control_pattern() -> re.Pattern[str]:
    listed = sorted((text for meaning in _MEANINGS for text in table()["equivalents"][meaning]), key=len, reverse=True)
    return re.compile("|".join([r"<[|｜][^<>\s|｜'\"{}]+[|｜]>", *map(re.escape, listed)]))


def _texts(tokenizer: PreTrainedTokenizerBase, templates: str | dict[str, str]) -> Iterator[str]:
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        yield template
        for conversation in _CONVERSATIONS:
            try:
                yield str(
                    tokenizer.apply_chat_template(
                        conversation, chat_template=template, tokenize=False, add_generation_prompt=True
                    )
                )
            except Exception as error:  # templates raise arbitrary errors, for example for a system role
                LOG.debug("Cannot apply the chat template to %s: %s", conversation, error)
