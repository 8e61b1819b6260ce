"""Test whether two models share an embedding space, so that rows can be copied between them.

Fine-tunes of one base do: training changes rows a little and keeps the axes. Models that were initialised separately
do not, whatever their width and vocabulary.
"""

import torch

from mergekit_omp.vocabulary.matching import VocabularyMatch

SAMPLE = 2048
"""Number of anchors whose rows are compared."""

FEWEST = 32
"""Number of anchors below which the test is inconclusive; fine-tunes of one base share a vocabulary."""

THRESHOLD = 0.5
"""Median similarity above which two models count as sharing a space.

Measured values (docs/quality.md, "One space"): rows of unrelated matrices have a similarity within 0.03 of 0. Two
sentence encoders that were trained from one base on hundreds of millions of pairs have 0.88. Copies of SmolLM2 and
Gemma with Gaussian noise have 0.99 with a tenth of the matrix's standard deviation, 0.80 and 0.87 with half of it, and
0.50 and 0.62 with all of it.
"""


def sample_anchors(first: VocabularyMatch, second: VocabularyMatch) -> torch.Tensor:
    """Choose at most ``SAMPLE`` output ids int64 (A,) of text that both models have, evenly over the vocabulary."""
    both = (first.is_text() & second.is_text()).nonzero().flatten()
    if len(both) <= SAMPLE:
        return both
    return both[torch.linspace(0, len(both) - 1, SAMPLE).long()]


def similarity(first: torch.Tensor, second: torch.Tensor) -> float:
    """Compute the similarity of two models' rows for the same tokens.

    Args:
        first: (A, d), rows of one model.
        second: (A, d), rows of the other model, in the same order.

    Returns:
        The median over the A tokens of 2 a·b / (‖a‖² + ‖b‖²), for rows a and b minus their means: 1 for equal rows, 0
        for unrelated rows, the cosine for rows of equal norm, and less for different norms. NaN without tokens.
    """
    # Rows of one matrix share a large common component (a mean cosine of 0.4 in SmolLM2).
    first, second = (rows.float() - rows.float().mean(dim=0) for rows in (first, second))
    norms = first.square().sum(dim=1) + second.square().sum(dim=1)
    return float((2 * (first * second).sum(dim=1) / norms.clamp_min(torch.finfo(torch.float32).tiny)).median())
