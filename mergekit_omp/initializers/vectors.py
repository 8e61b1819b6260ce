"""Read static vectors of tokens and words, or train them on a text, with gensim.

gensim is an optional dependency, so it is imported where it is used.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.vocabulary.segmentation import text_of
from mergekit_omp.vocabulary.tokens import TokenKind, Vocabulary

if TYPE_CHECKING:
    from gensim.models import Word2Vec
    from gensim.models.keyedvectors import KeyedVectors

    Model = TypeVar("Model", bound=Word2Vec)

LOG = logging.getLogger(__name__)

SEED = 0

ENOUGH_TOKENS = 1_000_000
"""Number of tokens to train on: a smaller corpus is read repeatedly, with a lower minimum count."""

_BLOCK_CHARACTERS = 2_000
"""Length of the blocks of lines in which a corpus is tokenized; gensim truncates blocks at 10,000 tokens."""

_BLOCKS_PER_BATCH = 512
_FASTTEXT_MAGIC = struct.pack("<i", 793712314)


def check_packages(names: Sequence[str], place: str) -> None:
    """Raise an OmpError if an optional package is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise OmpError(f"{place} needs {' and '.join(missing)}: pip install 'mergekit-omp[vectors]'.")


def check_corpus(path: str, place: str) -> None:
    """Raise an OmpError unless ``path`` is a file that starts with text in UTF-8."""
    _check_file(path, place, "a text file in UTF-8")
    if not next(_blocks(path, place), "").strip():
        raise OmpError(f"{place}: {path} does not start with text; name a text file in UTF-8.")


def check_vectors(path: str, place: str) -> None:
    """Raise an OmpError unless ``path`` has a format that :func:`read_vectors` can read."""
    _check_file(path, place, "a fastText .bin file or a word2vec text file")
    with open(path, "rb") as file:
        if file.read(4) == _FASTTEXT_MAGIC:
            return
    if _text_header(Path(path)) is None:
        raise OmpError(
            f"{place}: {path} is neither a fastText .bin file nor a text file with a word and its numbers on each "
            "line; name one of these, uncompressed."
        )


def read_vectors(path: str, place: str) -> KeyedVectors:
    """Read vectors from a fastText ``.bin`` file or from the text format of word2vec or GloVe, detected by content.

    Args:
        path: path of the file.
        place: its recipe key, for messages.

    Returns:
        The vectors.

    Raises:
        OmpError: if gensim cannot read the file.
    """
    from gensim.models import KeyedVectors
    from gensim.models.fasttext import load_facebook_vectors

    LOG.info("Reading vectors from %s", path)
    with open(path, "rb") as file:
        is_fasttext = file.read(4) == _FASTTEXT_MAGIC
    try:
        if is_fasttext:
            return load_facebook_vectors(path)
        return KeyedVectors.load_word2vec_format(
            path, no_header=_text_header(Path(path)) == "none", unicode_errors="replace"
        )
    except (ValueError, EOFError, AssertionError, NotImplementedError, struct.error) as error:
        raise OmpError(f"{place}: {path} cannot be read ({error}); name a file that gensim can read.") from error


def vectors_of(vectors: KeyedVectors, vocabulary: Vocabulary, ids: Tensor, *, by_text: bool) -> Tensor:
    """Look up the vectors of tokens by their strings, such as ``Ġthe``.

    Args:
        vectors: vectors of tokens or of words.
        vocabulary: vocabulary of the tokens.
        ids: int64 (T,), ids of the tokens.
        by_text: whether to look up a token without a vector by its text without surrounding spaces, and else to use
            the mean vector of the n-grams of its text, if the vectors have n-grams.

    Returns:
        float32 (T, d), zero rows for tokens without a vector.
    """
    found = np.zeros((len(ids), vectors.vector_size), dtype=np.float32)
    has_ngrams = bool(getattr(vectors, "bucket", 0))
    for place, id_ in enumerate(ids.tolist()):
        token = vocabulary.tokens[id_]
        text = (text_of(token.data) or "").strip() if by_text and token.kind is not TokenKind.SPECIAL else ""
        key = token.text if token.text in vectors.key_to_index else text
        if key in vectors.key_to_index or (has_ngrams and key):
            found[place] = vectors.get_vector(key)
    return torch.from_numpy(found)


@dataclass(frozen=True)
class TokenizedCorpus:
    """A tokenized text.

    Attributes:
        ids: int32 (T,), ids of all blocks, concatenated.
        ends: int64 (blocks,), end of each block in ``ids``.
    """

    ids: np.ndarray
    ends: np.ndarray

    @classmethod
    def read(cls, path: str, tokenizer: PreTrainedTokenizerBase, place: str) -> TokenizedCorpus:
        """Tokenize a text file, without special tokens.

        Args:
            path: path of the file, in UTF-8.
            tokenizer: tokenizer for the text; not modified.
            place: recipe key of the file, for messages.

        Returns:
            The tokenized text.

        Raises:
            OmpError: if the file is not in UTF-8, or has no tokens.
        """
        parts: list[np.ndarray] = []
        name = Path(path).name
        with tqdm(
            desc=f"Tokenizing {name}", unit=" characters", unit_scale=True, leave=False, disable=None
        ) as progress:
            for blocks in _batches(_blocks(path, place)):
                encoded = tokenizer(blocks, add_special_tokens=False, verbose=False).input_ids
                parts += [np.array(ids, dtype=np.int32) for ids in encoded]
                progress.update(sum(map(len, blocks)))
        if not any(map(len, parts)):
            raise OmpError(f"{place}: {path} contains no tokens; name a file with text.")
        return cls(np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))

    def passes(self, usual: int) -> int:
        """Return the number of epochs: the usual number, or more for a short corpus."""
        return max(usual, ENOUGH_TOKENS // len(self.ids))

    def minimum_count(self, usual: int) -> int:
        """Return the minimum count of a token with a vector: the usual one, or less for a short corpus."""
        return max(1, min(usual, usual * len(self.ids) // ENOUGH_TOKENS))

    def frequent(self, minimum: int) -> int:
        """Return the number of tokens with at least ``minimum`` occurrences."""
        return int((np.bincount(self.ids) >= minimum).sum())

    def train(self, make_model: Callable[..., Model], names: Callable[[int], str], passes: int) -> Model:
        """Train a gensim model in a single thread, so that results are reproducible.

        Args:
            make_model: creates the model from the remaining arguments.
            names: maps an id to the key of its vector.
            passes: number of epochs.

        Returns:
            The trained model.
        """
        # gensim lowers its learning rate with every batch, so a short corpus needs short batches.
        batch = min(10_000, max(100, len(self.ids) // 20))
        total = len(self.ends) * (passes + 1)  # gensim first reads all to count
        with tqdm(desc="Training vectors", total=total, unit=" blocks", leave=False, disable=None) as progress:
            sentences = _Sentences(self, names, progress.update)
            return make_model(sentences=sentences, epochs=passes, batch_words=batch, seed=SEED, workers=1)


@dataclass(frozen=True)
class _Sentences:
    """A corpus in the form that gensim reads repeatedly: a list of keys for each block."""

    corpus: TokenizedCorpus
    names: Callable[[int], str]
    tick: Callable[[], object]

    def __iter__(self) -> Iterator[list[str]]:
        start = 0
        for end in self.corpus.ends.tolist():
            yield [self.names(id_) for id_ in self.corpus.ids[start:end].tolist()]
            start = end
            self.tick()


def _blocks(path: str, place: str) -> Iterator[str]:
    """Yield the text of a file in blocks of lines; longer lines are split."""
    block = ""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while line := file.readline(_BLOCK_CHARACTERS):
                if block and len(block) + len(line) > _BLOCK_CHARACTERS:
                    yield block
                    block = ""
                block += line
    except UnicodeDecodeError as error:
        raise OmpError(f"{place}: {path} is not in UTF-8 ({error.reason}); convert it.") from None
    if block:
        yield block


def _batches(blocks: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for block in blocks:
        batch.append(block)
        if len(batch) == _BLOCKS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_file(path: str, place: str, expected: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise OmpError(f"{place}: {path} cannot be read ({error.strerror}); name {expected}.") from None


def _text_header(path: Path) -> str | None:
    """Detect the header of a text file of vectors: "counts" (word2vec), "none" (GloVe), None for other files."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first, second = (file.readline(1_000_000).rstrip().split(" ") for _ in range(2))
    try:
        if len(first) == 2 and int(first[0]) > 0:
            return "counts" if len(second[1:]) == int(first[1]) and _are_numbers(second[1:]) else None
    except ValueError:
        return None
    return "none" if len(first) > 2 and _are_numbers(first[1:]) else None


def _are_numbers(words: Sequence[str]) -> bool:
    try:
        return all(np.isfinite(float(word)) for word in words)
    except ValueError:
        return False
