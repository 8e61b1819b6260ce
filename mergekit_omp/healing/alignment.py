"""A window of text in the tokens of two tokenizers."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mergekit_omp.evaluation.spans import Span, find_spans, token_starts
from mergekit_omp.vocabulary.tokens import Vocabulary


@dataclass(frozen=True)
class Reader:
    """A tokenizer with what is needed to read windows with it.

    Attributes:
        tokenizer: of transformers.
        vocabulary: its vocabulary.
        start_id: the token before each window: bos, or eos where there is none.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    start_id: int

    def ids(self, window: str) -> list[int]:
        """Return a window's tokens, without the one before it."""
        return self.tokenizer(window, add_special_tokens=False).input_ids


@dataclass(frozen=True)
class AlignedWindow:
    """A window as both tokenizers read it.

    Attributes:
        text: the window.
        base_ids: the base's tokens.
        base_starts: the byte at which each begins.
        output_ids: the output's tokens.
        output_starts: the byte at which each begins.
    """

    text: str
    base_ids: Sequence[int]
    base_starts: Sequence[int]
    output_ids: Sequence[int]
    output_starts: Sequence[int]

    def spans(self) -> list[Span]:
        """Return the spans in order."""
        return find_spans(self.base_starts, self.output_starts, len(self.text.encode()))


def align(window: str, base: Reader, output: Reader) -> AlignedWindow | None:
    """Read a window with both tokenizers; None where either does not spell it byte for byte."""
    base_ids, output_ids = base.ids(window), output.ids(window)
    base_starts = token_starts(base_ids, window, base.vocabulary)
    output_starts = token_starts(output_ids, window, output.vocabulary)
    if base_starts is None or output_starts is None or not base_ids or not output_ids:
        return None
    return AlignedWindow(window, base_ids, base_starts, output_ids, output_starts)
