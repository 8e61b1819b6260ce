"""FOCUS: new rows as sparse means of the anchors that are most similar in a space of static token vectors.

Dobler and de Melo 2023, *FOCUS: Effective Embedding Initialization for Monolingual Specialization of Multilingual
Models* (https://arxiv.org/abs/2305.14481), on this project's match of the vocabularies. The authors' package deepfocus
is not used: it matches the vocabularies itself, holds the similarities of all tokens at once, and needs fasttext,
which has no wheels.
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
"""fastText hashes n-grams into 2,000,000 buckets, 2.4 GB at this dimension; a token has fewer n-grams than this."""

_SIMILARITIES_AT_A_TIME = 2**24
_LIKELY_SUPPORT = 512
"""Sparsemax sorts as many similarities at first, and more where that is not enough: a matter of speed alone."""


def check(parameters: OmpParameters, place: str) -> None:
    """Check what FOCUS needs of a recipe and of the environment.

    Raises:
        OmpError: neither or both of ``corpus`` and ``vectors`` are set, the file cannot be read, or a package is
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
    """Combine the anchors by the sparsemax of their cosine similarities with the token.

    The similarities are those of the vectors that the recipe names, or of fastText vectors that are learnt here from
    ``corpus``, tokenized by the output tokenizer. Tokens without a vector get the mean of the anchors' rows, where the
    paper draws from a normal distribution around the mean row; anchors without a vector are left aside.

    Raises:
        OmpError: no anchor has a vector.
    """
    parameters, problem = new.parameters, new.problem
    if parameters.vectors is not None:
        place = f"parameters.vectors: {parameters.vectors}"
        vectors, by_text = read_vectors(parameters.vectors, "parameters.vectors"), True
    else:
        assert parameters.corpus is not None, "checked by check()"
        place = f"parameters.corpus: {parameters.corpus}"
        vectors, by_text = learn_fasttext_vectors(parameters.corpus, new.output, new.output_tokenizer), False
    anchors, targets = (
        vectors_of(vectors, new.output, ids, by_text=by_text) for ids in (problem.atom_ids, problem.target_ids)
    )
    usable, known = anchors.any(dim=1), targets.any(dim=1)
    if not usable.any():
        raise OmpError(f"{place} gives a vector to none of the tokens that both vocabularies have; name another file.")
    LOG.info(
        "%d of %d new tokens have no vector and get the mean row; %d of %d anchors have none and are left aside",
        int((~known).sum()),
        len(known),
        int((~usable).sum()),
        len(usable),
    )
    means = similarity_means(targets[known], anchors[usable])
    usable_rows = new.anchor_rows[usable]

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        made = new.mean_row(weight).repeat(len(known), 1)
        made[known.to(weight.device)] = means.apply(weight[usable_rows.to(weight.device)].float())
        return made

    return rows


def learn_fasttext_vectors(corpus: str, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> KeyedVectors:
    """Learn fastText vectors (CBOW, with n-grams of the tokens' strings) of a vocabulary's tokens.

    The settings are fastText's own and those of deepfocus, but for the dimension, which there is 100 by default. A
    corpus below a million tokens is read more often, and gives vectors to rarer tokens.

    Args:
        corpus: a text file in UTF-8.
        vocabulary: the tokenizer's.
        tokenizer: left as it is.

    Returns:
        A vector for the string of each token that is frequent enough.

    Raises:
        OmpError: the file is not in UTF-8.
    """
    from gensim.models import FastText

    text = TokenizedCorpus.read(corpus, tokenizer, "parameters.corpus")
    minimum = text.minimum_count(MINIMUM_COUNT)
    make = functools.partial(
        FastText,
        vector_size=DIMENSION,
        min_count=minimum,
        sg=0,
        negative=10,
        alpha=0.05,
        sample=1e-4,
        bucket=min(2_000_000, _BUCKETS_PER_TOKEN * text.frequent(minimum)),
    )
    return text.train(make, lambda id_: vocabulary.tokens[id_].text, text.passes(EPOCHS)).wv


@dataclass(frozen=True)
class SparseMeans:
    """Weighted means of anchors for B tokens, the weights of one token after the other's.

    Attributes:
        anchors: int64 [W], which anchor each weight is for.
        weights: float32 [W], above 0; those of a token sum to 1.
        ends: int64 [B + 1], a 0, and where each token's weights end.
    """

    anchors: Tensor
    weights: Tensor
    ends: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """The means, float32 [B, D], of the anchors' rows, float32 [N, D], on the rows' device."""
        anchors, weights, ends = (each.to(rows.device) for each in (self.anchors, self.weights, self.ends))
        return embedding_bag(anchors, rows, ends, mode="sum", per_sample_weights=weights, include_last_offset=True)


def similarity_means(targets: Tensor, anchors: Tensor) -> SparseMeans:
    """Weigh anchors by the sparsemax of their cosine similarities with each target.

    Args:
        targets: float32 [B, d], no row of zeros.
        anchors: float32 [N, d], no row of zeros.
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
