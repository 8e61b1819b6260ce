"""WECHSEL: new rows are means of the rows of tokens with similar meaning, found through words of both languages.

Source: Minixhofer, Paischer & Rekabsaz (2022), arXiv:2112.06598, section 3. Static vectors of words of two
languages are aligned by the rotation that best maps the words of a bilingual dictionary to each other (orthogonal
Procrustes). In that space every token of both vocabularies gets an embedding: the sum of the vectors of its n-grams if
the vectors are fastText's with n-grams, else the mean of the vectors of the words that contain it, weighted by their
frequency. The row of a new token is the mean of the rows of the tokens with the nearest embeddings, weighted by a
softmax of the cosines.

The authors' package, ``wechsel`` 0.0.4, is not used: it needs the ``fasttext`` bindings, which have to be compiled and
read no text format. Details that the paper does not specify follow the package: the forms in which words of a
dictionary are looked up, and word counts from gensim, which derives them from the order of words if a file has none.
Differences: anchors keep the model's rows, tokens are compared by their bytes, and only ordinary tokens are sources.

Letters in shapes: B targets, S source tokens, R rows of the model, D its width, d width of the word vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.vectors import check_packages, check_vectors, read_vectors
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.rows import NOISE_SEED
from mergekit_omp.vocabulary.segmentation import text_encoder, text_of
from mergekit_omp.vocabulary.tokens import TokenKind, Vocabulary

if TYPE_CHECKING:
    from gensim.models.keyedvectors import KeyedVectors

LOG = logging.getLogger(__name__)

NEIGHBOURS = 10
"""Number of source tokens per new token: the paper's k."""

TEMPERATURE = 0.1
"""Temperature of the softmax of the cosines: the paper's τ."""

_TARGETS_PER_BATCH = 1024
_WORDS_PER_BATCH = 50_000
_REQUIRED = ("source_vectors", "vectors", "dictionary")


def check_wechsel(parameters: OmpParameters, place: str) -> None:
    """Check that both files of vectors and the dictionary exist and have a known format.

    Args:
        parameters: parameters of the recipe.
        place: their path in the recipe, for messages.

    Raises:
        OmpError: if one of them is not set or cannot be read, or gensim or scipy is not installed.
    """
    paths = _paths(parameters, place)
    check_packages(("gensim", "scipy"), f"{place}: approximation: wechsel")
    for name in ("source_vectors", "vectors"):
        check_vectors(paths[name], f"{place}.{name}")
    _read_dictionary(paths["dictionary"], f"{place}.dictionary")


def _paths(parameters: OmpParameters, place: str) -> dict[str, str]:
    """Return the files that the recipe names, by parameter.

    Raises:
        OmpError: if one of them is not set.
    """
    given = {name: getattr(parameters, name) for name in _REQUIRED}
    missing = [name for name, path in given.items() if path is None]
    if missing:
        raise OmpError(
            f"{place}: approximation: wechsel needs {' and '.join(missing)}; add source_vectors: and vectors: with "
            "vectors of words in the model's and in the new language, and dictionary: with a word and its translation "
            "on each line."
        )
    return given


def wechsel(new: NewTokens) -> RowFunction:
    """Compute means of the rows of the model's ordinary tokens that are nearest in meaning.

    Tokens without an embedding (special tokens, invalid UTF-8, text that no word contains) get samples from the normal
    distribution of the source tokens' rows, independent per dimension, as in the paper, with a fixed seed. Unlike the
    mean of the anchors' rows, samples distinguish these tokens from each other.

    Raises:
        OmpError: if the vectors have different widths, or share no words with the dictionary or the vocabulary.
    """
    parameters = new.parameters
    paths = _paths(parameters, "parameters")
    dictionary = _read_dictionary(paths["dictionary"], "parameters.dictionary")
    own_words, new_words = zip(*dictionary, strict=True)
    ordinary = torch.tensor([id_ for id_, token in new.model.tokens.items() if token.kind is TokenKind.ORDINARY])
    # One language after the other: all vectors of a language take gigabytes, and few are needed afterwards.
    source = _Language.read(
        paths["source_vectors"], "parameters.source_vectors", own_words, new.model, new.tokenizer, ordinary
    )
    target = _Language.read(
        paths["vectors"],
        "parameters.vectors",
        new_words,
        new.output,
        new.output_tokenizer,
        new.problem.target_ids,
    )
    rotation = _align(source, target, dictionary, parameters)
    known = source.known()
    if not known.any():
        raise OmpError(
            f"parameters.source_vectors: {parameters.source_vectors} has no word that contains a token of the model; "
            "name vectors of words in the model's language."
        )
    sources = ordinary[known]  # (S,)
    embedded = target.known()
    cosines, places = _nearest(target.embeddings[embedded], source.embeddings[known] @ rotation)
    weights = torch.softmax(cosines / TEMPERATURE, dim=1)
    LOG.info(
        "WECHSEL: %d of %d new tokens from %d tokens of the model; %d have no embedding and get random rows",
        int(embedded.sum()),
        len(embedded),
        len(sources),
        int((~embedded).sum()),
    )

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        of_sources = weight[sources.to(weight.device)].float()
        new_rows = _sample(of_sources, len(embedded))
        new_rows[embedded.to(weight.device)] = embedding_bag(
            places.to(weight.device), of_sources, per_sample_weights=weights.to(weight.device), mode="sum"
        )
        return new_rows

    return rows


@dataclass(frozen=True)
class _Language:
    """The part of the word vectors of one language that is used.

    Attributes:
        embeddings: float32 (T, d), embeddings of the requested tokens; zero rows for tokens without one.
        words: vectors of the dictionary's words, in all forms that have one.
    """

    embeddings: Tensor
    words: Mapping[str, np.ndarray]

    @classmethod
    def read(
        cls,
        path: str,
        place: str,
        words: Iterable[str],
        vocabulary: Vocabulary,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
    ) -> _Language:
        vectors = read_vectors(path, place)
        forms = {form for word in words for form in _forms(word) if form in vectors.key_to_index}
        has_ngrams = bool(getattr(vectors, "bucket", 0))
        return cls(
            _from_ngrams(vectors, vocabulary, ids) if has_ngrams else _from_words(vectors, vocabulary, tokenizer, ids),
            {form: vectors.get_vector(form) for form in forms},
        )

    def known(self) -> Tensor:
        """Return bool (T,): whether a token has an embedding."""
        return (self.embeddings != 0).any(dim=1)


def _from_ngrams(vectors: KeyedVectors, vocabulary: Vocabulary, ids: Tensor) -> Tensor:
    """Compute embeddings of tokens from fastText's n-grams, as if their text were a word."""
    found = np.zeros((len(ids), vectors.vector_size), dtype=np.float32)
    for place, id_ in enumerate(ids.tolist()):
        token = vocabulary.tokens[id_]
        text = (text_of(token.data) or "").strip()
        if text and token.is_text:
            found[place] = vectors.get_vector(text)
    return torch.from_numpy(found)


def _from_words(
    vectors: KeyedVectors, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> Tensor:
    """Compute embeddings of tokens as means of word vectors, weighted by word counts.

    A word contributes to every token of its segmentation, once without and once with a space before it.
    """
    from scipy.sparse import csr_array

    encode = text_encoder(tokenizer, vocabulary)
    place_of = np.full(vocabulary.size, -1)
    place_of[ids.numpy()] = np.arange(len(ids))
    sums = np.zeros((len(ids), vectors.vector_size))
    total = np.zeros((len(ids), 1))
    for start in range(0, len(vectors), _WORDS_PER_BATCH):
        part = slice(start, start + _WORDS_PER_BATCH)
        words, counts = vectors.index_to_key[part], vectors.expandos["count"][part]
        occurrences = [
            (token, word)
            for texts in (words, [f" {word}" for word in words])
            for word, tokens in enumerate(encode(texts))
            for token in set(tokens)
        ]
        tokens, of_words = np.array(occurrences, dtype=np.int64).reshape(-1, 2).T
        requested = place_of[tokens] >= 0
        tokens, of_words = place_of[tokens[requested]], of_words[requested]
        weights = csr_array((counts[of_words].astype(float), (tokens, of_words)), shape=(len(ids), len(words)))
        sums += weights @ vectors.vectors[part]
        total += weights.sum(axis=1)[:, None]
    return torch.from_numpy(sums / np.where(total > 0, total, 1)).float()


def _align(
    source: _Language, target: _Language, dictionary: Sequence[tuple[str, str]], parameters: OmpParameters
) -> Tensor:
    """Compute the rotation float32 (d, d) from the vectors of the source language to the target language.

    A pair of the dictionary counts in every form that both languages have, and twice if the form is lower case, as in
    the authors' code.

    Raises:
        OmpError: if the vectors have different widths, or the dictionary pairs none of their words.
    """
    from scipy.linalg import orthogonal_procrustes

    widths = source.embeddings.shape[1], target.embeddings.shape[1]
    if widths[0] != widths[1]:
        raise OmpError(
            f"parameters.source_vectors: {parameters.source_vectors} has vectors of width {widths[0]}, but vectors: "
            f"{parameters.vectors} of width {widths[1]}; name vectors of one width."
        )
    pairs = [
        (source.words[own], target.words[new])
        for pair in dictionary
        for own in _forms(pair[0])
        for new in _forms(pair[1])
        if own in source.words and new in target.words
    ]
    if not pairs:
        raise OmpError(
            f"parameters.dictionary: no line of {parameters.dictionary} has its first word in source_vectors: and its "
            "second in vectors:; name a dictionary from the language of the former to that of the latter."
        )
    LOG.info("WECHSEL: aligned with %d pairs of words", len(pairs))
    left, right = (np.stack(side).astype(float) for side in zip(*pairs, strict=True))
    return torch.from_numpy(orthogonal_procrustes(left, right)[0]).float()


def _forms(word: str) -> tuple[str, str, str]:
    return word, word.lower(), word.title()


def _nearest(targets: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest sources (S, d) of targets (T, d): cosines float32 and indices int64, (T, min(k, S)) each."""
    sources = normalize(sources, dim=1)
    k = min(NEIGHBOURS, len(sources))
    parts = [(normalize(part, dim=1) @ sources.T).topk(k, dim=1) for part in targets.split(_TARGETS_PER_BATCH)]
    cosines, places = (torch.cat(batches) for batches in zip(*parts, strict=True))
    return cosines, places


def _sample(rows: Tensor, count: int) -> Tensor:
    """Sample float32 (count, D) from the normal distribution of rows (S, D) with diagonal covariance."""
    generator = torch.Generator().manual_seed(NOISE_SEED)  # on the CPU, so that every device uses the same noise
    noise = torch.randn(count, rows.shape[1], generator=generator).to(rows.device)
    return rows.mean(dim=0) + rows.std(dim=0, correction=0) * noise


def _read_dictionary(path: str, place: str) -> list[tuple[str, str]]:
    """Read pairs of words from a text file with two columns, separated by a tab or else by spaces.

    Raises:
        OmpError: if the file cannot be read, has no pairs, or has a line without two columns.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise OmpError(f"{place}: {path} cannot be read ({error.strerror}); name a text file in UTF-8.") from None
    except UnicodeDecodeError as error:
        raise OmpError(f"{place}: {path} is not in UTF-8 ({error.reason}); name a text file in UTF-8.") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line:
            continue
        if len(columns) != 2:
            raise OmpError(
                f"{place}: line {number} of {path} has {len(columns)} columns; write a word, a tab and its "
                "translation."
            )
        pairs.append((columns[0].strip(), columns[1].strip()))
    if not pairs:
        raise OmpError(f"{place}: {path} is empty; name a file with a word and its translation on each line.")
    return pairs
