"""WECHSEL: a new token is a mean of the model's tokens of like meaning, found through words of both languages.

After Minixhofer, Paischer and Rekabsaz 2022, arXiv 2112.06598, section 3. Static vectors of the words of two languages
are aligned by a rotation that brings the words of a bilingual dictionary together (orthogonal Procrustes). In that
space every token of both vocabularies gets an embedding: the sum of its n-grams' vectors where the vectors are
fastText's with n-grams, else the mean of the vectors of the words that it is a part of, weighed by how frequent they
are. The row of a new token is then the mean of the rows of the tokens with the nearest embeddings, weighed by a
softmax of the cosines.

The authors' package, ``wechsel`` 0.0.4, is not used: it needs the ``fasttext`` bindings, which have to be compiled and
read no text format. What the paper leaves open is done as there: in which forms a dictionary's words are looked up,
and that counts come from gensim, which makes them up from the order of the words where a file has none. What differs:
anchors keep the model's rows, tokens are read as the bytes that they stand for, and only ordinary tokens are sources.

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
"""How many source tokens a new one is a mean of: the paper's k."""

TEMPERATURE = 0.1
"""Of the softmax of the cosines: the paper's τ."""

_TARGETS_AT_A_TIME = 1024
_WORDS_AT_A_TIME = 50_000
_NEEDED = ("source_vectors", "vectors", "dictionary")


def check(parameters: OmpParameters, place: str) -> None:
    """Look whether both files of vectors and the dictionary are there and look like what they have to be.

    Raises:
        OmpError: one of them is not given or cannot be read, or gensim or scipy is not installed.
    """
    paths = _paths(parameters, place)
    check_packages(("gensim", "scipy"), f"{place}: approximation: wechsel")
    for name in ("source_vectors", "vectors"):
        check_vectors(paths[name], f"{place}.{name}")
    _read_dictionary(paths["dictionary"], f"{place}.dictionary")


def _paths(parameters: OmpParameters, place: str) -> dict[str, str]:
    """The files that the recipe names, by parameter.

    Raises:
        OmpError: one of them is not given.
    """
    given = {name: getattr(parameters, name) for name in _NEEDED}
    missing = [name for name, path in given.items() if path is None]
    if missing:
        raise OmpError(
            f"{place}: approximation: wechsel needs {' and '.join(missing)}; add source_vectors: and vectors: with "
            "vectors of words in the model's and in the new language, and dictionary: with a word and its translation "
            "in each line."
        )
    return given


def wechsel(new: NewTokens) -> RowFunction:
    """Means of the rows of the model's ordinary tokens that are nearest in meaning.

    Tokens without an embedding (special tokens, bytes that are no text, text that no word has) get draws from the
    normal distribution of the source tokens' rows, independent for each dimension, as in the paper; the same in every
    run. That tells them apart from each other, which the mean of the anchors' rows would not.

    Raises:
        OmpError: the vectors are of different widths, or of words that the dictionary or the vocabulary has none of.
    """
    parameters = new.parameters
    paths = _paths(parameters, "parameters")
    dictionary = _read_dictionary(paths["dictionary"], "parameters.dictionary")
    own_words, new_words = zip(*dictionary, strict=True)
    ordinary = torch.tensor([id_ for id_, token in new.model.tokens.items() if token.kind is TokenKind.ORDINARY])
    # One language after the other: vectors of a whole language take gigabytes, and few of them are needed afterwards.
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
            f"parameters.source_vectors: {parameters.source_vectors} has no word that a token of the model is in; "
            "name vectors of words in the model's language."
        )
    sources = ordinary[known]  # [S]
    answered = target.known()
    cosines, places = _nearest(target.embeddings[answered], source.embeddings[known] @ rotation)
    weights = torch.softmax(cosines / TEMPERATURE, dim=1)
    LOG.info(
        "WECHSEL: %d of %d new tokens from %d tokens of the model; %d have no embedding and get random rows",
        int(answered.sum()),
        len(answered),
        len(sources),
        int((~answered).sum()),
    )

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        of_sources = weight[sources.to(weight.device)].float()
        made = _draw(of_sources, len(answered))
        made[answered.to(weight.device)] = embedding_bag(
            places.to(weight.device), of_sources, per_sample_weights=weights.to(weight.device), mode="sum"
        )
        return made

    return rows


@dataclass(frozen=True)
class _Language:
    """What is needed of the word vectors of one language.

    Attributes:
        embeddings: float32 [T, d] of the tokens that were asked for; zeros where there is none.
        words: the vectors of the dictionary's words, in all forms that there are.
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
        """Boolean [T]: which tokens have an embedding."""
        return (self.embeddings != 0).any(dim=1)


def _from_ngrams(vectors: KeyedVectors, vocabulary: Vocabulary, ids: Tensor) -> Tensor:
    """Embeddings of tokens by fastText's n-grams, as if their text were a word."""
    found = np.zeros((len(ids), vectors.vector_size), dtype=np.float32)
    for place, id_ in enumerate(ids.tolist()):
        token = vocabulary.tokens[id_]
        text = (text_of(token.data) or "").strip()
        if text and token.kind in (TokenKind.ORDINARY, TokenKind.BYTE):
            found[place] = vectors.get_vector(text)
    return torch.from_numpy(found)


def _from_words(
    vectors: KeyedVectors, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> Tensor:
    """Embeddings of tokens as means of words' vectors, weighed by the words' counts.

    A word counts for every token that it is split into, once as it stands and once after a space.
    """
    from scipy.sparse import csr_array

    encode = text_encoder(tokenizer, vocabulary)
    place_of = np.full(vocabulary.size, -1)
    place_of[ids.numpy()] = np.arange(len(ids))
    sums = np.zeros((len(ids), vectors.vector_size))
    total = np.zeros((len(ids), 1))
    for start in range(0, len(vectors), _WORDS_AT_A_TIME):
        part = slice(start, start + _WORDS_AT_A_TIME)
        words, counts = vectors.index_to_key[part], vectors.expandos["count"][part]
        occurrences = [
            (token, word)
            for texts in (words, [f" {word}" for word in words])
            for word, tokens in enumerate(encode(texts))
            for token in set(tokens)
        ]
        tokens, of_words = np.array(occurrences, dtype=np.int64).reshape(-1, 2).T
        wanted = place_of[tokens] >= 0
        tokens, of_words = place_of[tokens[wanted]], of_words[wanted]
        weights = csr_array((counts[of_words].astype(float), (tokens, of_words)), shape=(len(ids), len(words)))
        sums += weights @ vectors.vectors[part]
        total += weights.sum(axis=1)[:, None]
    return torch.from_numpy(sums / np.where(total > 0, total, 1)).float()


def _align(
    source: _Language, target: _Language, dictionary: Sequence[tuple[str, str]], parameters: OmpParameters
) -> Tensor:
    """The rotation, float32 [d, d], from the vectors of the source language into the target's.

    A pair of the dictionary counts in every form that both languages have, one that is its own lower case twice, as in
    the authors' code.

    Raises:
        OmpError: the vectors are of different widths, or the dictionary pairs none of their words.
    """
    from scipy.linalg import orthogonal_procrustes

    widths = source.embeddings.shape[1], target.embeddings.shape[1]
    if widths[0] != widths[1]:
        raise OmpError(
            f"parameters.source_vectors: {parameters.source_vectors} has vectors of {widths[0]} numbers, and vectors: "
            f"{parameters.vectors} of {widths[1]}; name vectors of one width."
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
    LOG.info("WECHSEL: aligned by %d pairs of words", len(pairs))
    left, right = (np.stack(side).astype(float) for side in zip(*pairs, strict=True))
    return torch.from_numpy(orthogonal_procrustes(left, right)[0]).float()


def _forms(word: str) -> tuple[str, str, str]:
    return word, word.lower(), word.title()


def _nearest(targets: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest sources [S, d] of each target [T, d]: cosines and places, float32 and int64 [T, min(k, S)]."""
    sources = normalize(sources, dim=1)
    k = min(NEIGHBOURS, len(sources))
    parts = [(normalize(part, dim=1) @ sources.T).topk(k, dim=1) for part in targets.split(_TARGETS_AT_A_TIME)]
    cosines, places = (torch.cat(each) for each in zip(*parts, strict=True))
    return cosines, places


def _draw(rows: Tensor, count: int) -> Tensor:
    """Draws from the normal distribution of rows [S, D], without covariances: float32 [count, D]."""
    generator = torch.Generator().manual_seed(NOISE_SEED)  # on the CPU, so that every device draws the same
    noise = torch.randn(count, rows.shape[1], generator=generator).to(rows.device)
    return rows.mean(dim=0) + rows.std(dim=0, correction=0) * noise


def _read_dictionary(path: str, place: str) -> list[tuple[str, str]]:
    """The pairs of a text file: two columns, separated by a tab, or by spaces where there is none.

    Raises:
        OmpError: the file cannot be read, has no pairs, or a line without two columns.
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
        raise OmpError(f"{place}: {path} is empty; name a file with a word and its translation in each line.")
    return pairs
