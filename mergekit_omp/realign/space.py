"""Whether two models share a matrix space, so that a row of one means the same in the other.

Fine-tunes of one base do: training moves rows a little and leaves the axes alone. Models that were initialised
separately do not, whatever their width and vocabulary.
"""

import torch

from mergekit_omp.vocabulary.matching import VocabularyMatch

SAMPLE = 2048
"""Anchors whose rows are compared."""

FEWEST = 32
"""Anchors below which nothing is concluded; fine-tunes of one base share a vocabulary."""

THRESHOLD = 0.5
"""Median similarity from which on two models share a space.

Measured (docs/quality.md, "One space"): rows of unrelated matrices are within 0.03 of 0. Two sentence encoders that
were trained from one base on hundreds of millions of pairs are at 0.88; copies of SmolLM2 and Gemma are at 0.99 with
noise of a tenth of the deviation of the matrix, at 0.80 and 0.87 with half of it, and at 0.50 and 0.62 with all of it.
"""


def sample_anchors(first: VocabularyMatch, second: VocabularyMatch) -> torch.Tensor:
    """Choose output ids of text that both models have, int64 (A,), at most ``SAMPLE``, evenly over the vocabulary."""
    both = (first.is_text() & second.is_text()).nonzero().flatten()
    if len(both) <= SAMPLE:
        return both
    return both[torch.linspace(0, len(both) - 1, SAMPLE).long()]


def similarity(first: torch.Tensor, second: torch.Tensor) -> float:
    """Compare the rows that two models have for the same tokens.

    Args:
        first: (A, d) rows of one model.
        second: (A, d) rows of the other, in the same order.

    Returns:
        The median over the A tokens of 2 a·b / (|a|² + |b|²), for rows a and b less their means: 1 for equal rows, 0
        for unrelated ones; the cosine where norms are equal, less where they are not. NaN where there are no tokens.
    """
    # Rows of one matrix have much in common (a cosine of 0.4 in SmolLM2), whatever their tokens.
    first, second = (rows.float() - rows.float().mean(dim=0) for rows in (first, second))
    norms = first.square().sum(dim=1) + second.square().sum(dim=1)
    return float((2 * (first * second).sum(dim=1) / norms.clamp_min(torch.finfo(torch.float32).tiny)).median())
