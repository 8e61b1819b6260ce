"""FOCUS: new rows are sparse means of the anchors that are most similar in a space of static token vectors.

Source: Dobler & de Melo (2023), "FOCUS: Effective Embedding Initialization for Monolingual Specialization of
Multilingual Models" (arXiv:2305.14481), with the match of the vocabularies of this package. The authors' package
deepfocus is not used: it matches the vocabularies itself, keeps the similarities of all tokens in memory, and needs
fasttext, which has no wheels.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.vectors import (
    TokenizedCorpus,
    check_corpus,
    check_packages,
    check_vectors,
    read_vectors,
    vectors_of,
)
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.vocabulary.tokens import Vocabulary

if TYPE_CHECKING:
    from gensim.models.keyedvectors import KeyedVectors

LOG = logging.getLogger(__name__)

DIMENSION = 300
EPOCHS = 3
MINIMUM_COUNT = 10

_BUCKETS_PER_TOKEN = 20
"""Buckets of n-grams per token. fastText's 2,000,000 take 2.4 GB at this dimension; tokens have fewer n-grams."""

_SIMILARITIES_AT_A_TIME = 2**24
_LIKELY_SUPPORT = 512
"""Number of similarities that sparsemax sorts at first; it sorts more if needed, so this only affects speed."""


def check_focus(parameters: OmpParameters, place: str) -> None:
    """Check the parameters, files and packages that FOCUS needs.

    Args:
        parameters: parameters of the recipe.
        place: their path in the recipe, for messages.

    Raises:
        OmpError: if neither or both of ``corpus`` and ``vectors`` are set, the file cannot be read, or a package is
            missing.
    """
    if (parameters.corpus is None) == (parameters.vectors is None):
        raise OmpError(
            f"{place}: approximation: focus needs either corpus: or vectors:, and "
            f"{'none is' if parameters.corpus is None else 'both are'} set; write the path of a text file or of token "
            "vectors."
        )
    check_packages(("gensim", "entmax"), f"{place}: approximation: focus")
    if parameters.corpus is not None:
        check_corpus(parameters.corpus, f"{place}.corpus")
    elif parameters.vectors is not None:
        check_vectors(parameters.vectors, f"{place}.vectors")


def focus(new: NewTokens) -> RowFunction:
    """Combine the anchors' rows with the sparsemax of their cosine similarities with the token as weights.

    The similarities are those of the vectors that the recipe names, or of fastText vectors trained on ``corpus`` with
    the output tokenizer. Tokens without a vector get the mean of the anchors' rows, where the paper samples from a
    normal distribution around the mean row. Anchors without a vector are excluded.

    Raises:
        OmpError: if no anchor has a vector.
    """
    parameters, problem = new.parameters, new.problem
    if parameters.vectors is not None:
        place = f"parameters.vectors: {parameters.vectors}"
        vectors, by_text = read_vectors(parameters.vectors, "parameters.vectors"), True
    else:
        assert parameters.corpus is not None, "checked by check_focus()"
        place = f"parameters.corpus: {parameters.corpus}"
        vectors, by_text = learn_fasttext_vectors(parameters.corpus, new.output, new.output_tokenizer), False
    anchors, targets = (
        vectors_of(vectors, new.output, ids, by_text=by_text) for ids in (problem.atom_ids, problem.target_ids)
    )
    usable, known = anchors.any(dim=1), targets.any(dim=1)
    if not usable.any():
        raise OmpError(f"{place} has vectors for none of the tokens that both vocabularies have; name another file.")
    LOG.info(
        "%d of %d new tokens have no vector and get the mean row; %d of %d anchors have none and are excluded",
        int((~known).sum()),
        len(known),
        int((~usable).sum()),
        len(usable),
    )
    means = similarity_means(targets[known], anchors[usable])
    usable_rows = new.anchor_rows[usable]

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        new_rows = new.mean_row(weight).repeat(len(known), 1)
        new_rows[known.to(weight.device)] = means.apply(weight[usable_rows.to(weight.device)].float())
        return new_rows

    return rows


def learn_fasttext_vectors(corpus: str, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> KeyedVectors:
    """Train fastText vectors (CBOW, with n-grams of the tokens' strings) of a vocabulary's tokens.

    The settings are those of fastText and deepfocus, except for the dimension, for which fastText's default is 100. A
    corpus of less than a million tokens is read more often, with a lower minimum count.

    Args:
        corpus: path of a text file in UTF-8.
        vocabulary: vocabulary of the tokenizer.
        tokenizer: tokenizer for the corpus; not modified.

    Returns:
        A vector for the string of each token that is frequent enough.

    Raises:
        OmpError: if the file is not in UTF-8.
    """
    from gensim.models import FastText

    text = TokenizedCorpus.read(corpus, tokenizer, "parameters.corpus")
    minimum = text.minimum_count(MINIMUM_COUNT)
    make_model = functools.partial(
        FastText,
        vector_size=DIMENSION,
        min_count=minimum,
        sg=0,
        negative=10,
        alpha=0.05,
        sample=1e-4,
        bucket=min(2_000_000, _BUCKETS_PER_TOKEN * text.frequent(minimum)),
    )
    return text.train(make_model, lambda id_: vocabulary.tokens[id_].text, text.passes(EPOCHS)).wv


@dataclass(frozen=True)
class SparseMeans:
    """Weighted means of anchors for B tokens, with the W weights of all tokens concatenated.

    Attributes:
        anchors: int64 (W,), anchor of each weight.
        weights: float32 (W,), positive; the weights of a token sum to 1.
        ends: int64 (B + 1,), 0, and the end of each token's weights.
    """

    anchors: Tensor
    weights: Tensor
    ends: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """Return the means float32 (B, D) of the anchors' rows float32 (N, D), on the device of the rows."""
        anchors, weights, ends = (part.to(rows.device) for part in (self.anchors, self.weights, self.ends))
        return embedding_bag(anchors, rows, ends, mode="sum", per_sample_weights=weights, include_last_offset=True)


def similarity_means(targets: Tensor, anchors: Tensor) -> SparseMeans:
    """Weight anchors by the sparsemax of their cosine similarities with each target.

    Args:
        targets: float32 (B, d), without zero rows.
        anchors: float32 (N, d), without zero rows.
    """
    from entmax import sparsemax

    targets, anchors = normalize(targets, dim=1), normalize(anchors, dim=1)
    chosen, weights, counts = [], [], [torch.zeros(1, dtype=torch.int64)]
    step = max(1, _SIMILARITIES_AT_A_TIME // len(anchors))
    for part in tqdm(targets.split(step), desc="Comparing with anchors", leave=False, disable=None):
        dense = sparsemax(part @ anchors.T, dim=1, k=_LIKELY_SUPPORT)
        chosen.append(dense.nonzero()[:, 1])
        weights.append(dense[dense > 0])
        counts.append((dense > 0).sum(dim=1))
    return SparseMeans(torch.cat(chosen), torch.cat(weights), torch.cat(counts).cumsum(dim=0))
