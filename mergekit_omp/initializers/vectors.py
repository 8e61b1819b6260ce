"""Static vectors of tokens and words: files of the user's, and training on a text of the user's, both by gensim.

gensim is an optional package, so that it is imported where it is used.
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
"""A corpus of fewer tokens is read more often, up to so many in all, and fewer occurrences are enough for a vector."""

_BLOCK_CHARACTERS = 2_000
"""A corpus is tokenized in blocks of lines; gensim drops what a block has above 10,000 tokens, which none reaches."""

_BLOCKS_AT_A_TIME = 512
_FASTTEXT_MAGIC = struct.pack("<i", 793712314)


def check_packages(names: Sequence[str], place: str) -> None:
    """Raise an OmpError if one of these optional packages is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise OmpError(f"{place} needs {' and '.join(missing)}: pip install 'mergekit-omp[vectors]'.")


def check_corpus(path: str, place: str) -> None:
    """Raise an OmpError unless ``path`` is a file that begins with text in UTF-8."""
    _check_file(path, place, "a text file in UTF-8")
    if not next(_blocks(path, place), "").strip():
        raise OmpError(f"{place}: {path} begins with no text; name a text file in UTF-8.")


def check_vectors(path: str, place: str) -> None:
    """Raise an OmpError unless ``path`` is a file that looks like vectors that :func:`read_vectors` can read."""
    _check_file(path, place, "a fastText .bin file or a word2vec text file")
    with open(path, "rb") as file:
        if file.read(4) == _FASTTEXT_MAGIC:
            return
    if _text_header(Path(path)) is None:
        raise OmpError(
            f"{place}: {path} is neither a fastText .bin file nor a text file with a word and its numbers in each "
            "line; name one of these, unpacked."
        )


def read_vectors(path: str, place: str) -> KeyedVectors:
    """Read vectors from a fastText ``.bin``, or from word2vec's or GloVe's text format; the content tells which.

    Args:
        path: the file.
        place: the recipe key that names it, for the error.

    Raises:
        OmpError: gensim cannot read the file.
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
    """The vectors of tokens, looked up by the string that the tokenizer writes, such as ``Ġthe``.

    Args:
        vectors: of tokens or of words.
        vocabulary: the tokens'.
        ids: int64 [T].
        by_text: whether a token that is not found is looked up by its text without the spaces around it, and if that
            is not found either, gets the mean vector of its text's n-grams, where the vectors come with such.

    Returns:
        float32 [T, d]; zeros for a token without a vector.
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
    """A text as ids.

    Attributes:
        ids: int32 [T], of all blocks one after the other.
        ends: int64 [blocks], where each block ends in ``ids``.
    """

    ids: np.ndarray
    ends: np.ndarray

    @classmethod
    def read(cls, path: str, tokenizer: PreTrainedTokenizerBase, place: str) -> TokenizedCorpus:
        """Tokenize a text file, without special tokens.

        Args:
            path: the file, in UTF-8.
            tokenizer: left as it is.
            place: the recipe key that names the file, for the error.

        Raises:
            OmpError: the file is not in UTF-8, or gives no tokens.
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
            raise OmpError(f"{place}: {path} gives no tokens; name a file with text.")
        return cls(np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))

    def passes(self, usual: int) -> int:
        """How often to read it: as usual, or more often if it is short."""
        return max(usual, ENOUGH_TOKENS // len(self.ids))

    def minimum_count(self, usual: int) -> int:
        """How often a token has to occur to get a vector: as usual, or fewer times if the corpus is short."""
        return max(1, min(usual, usual * len(self.ids) // ENOUGH_TOKENS))

    def frequent(self, minimum: int) -> int:
        """How many tokens occur at least that often."""
        return int((np.bincount(self.ids) >= minimum).sum())

    def train(self, make: Callable[..., Model], names: Callable[[int], str], passes: int) -> Model:
        """Train one of gensim's models in one thread, so that every run gives the same.

        Args:
            make: the model, but for what is given here.
            names: from an id to the key of its vector.
            passes: how often the corpus is read.
        """
        # gensim lowers its learning rate from batch to batch, so that a short corpus needs short ones.
        batch = min(10_000, max(100, len(self.ids) // 20))
        total = len(self.ends) * (passes + 1)  # gensim first reads all to count
        with tqdm(desc="Training vectors", total=total, unit=" blocks", leave=False, disable=None) as progress:
            sentences = _Sentences(self, names, progress.update)
            return make(sentences=sentences, epochs=passes, batch_words=batch, seed=SEED, workers=1)


@dataclass(frozen=True)
class _Sentences:
    """A corpus as gensim reads it: again and again, a list of keys for each block."""

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
    """The text of a file: lines together up to some length, and parts of lines that are longer."""
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
        if len(batch) == _BLOCKS_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_file(path: str, place: str, wanted: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise OmpError(f"{place}: {path} cannot be read ({error.strerror}); name {wanted}.") from None


def _text_header(path: Path) -> str | None:
    """What a text file of vectors begins with: "counts" as word2vec's, "none" as GloVe's, None if it is not one."""
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
