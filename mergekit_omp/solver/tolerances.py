"""Define the solver's tolerances."""

import torch

ROUNDING = torch.finfo(torch.float32).eps
"""Relative spacing of float32 numbers; the error of one operation is at most half of it."""

ZERO = 8 * ROUNDING
"""Residuals, and correlations with an atom of norm 1, below this share of the target's norm count as rounding
errors."""

DEPENDENT = 1e-5
"""An atom with less than this share of its norm outside the span of the support counts as linearly dependent."""

CANCELLED = 0.2
"""Gram-Schmidt is repeated where it leaves less than this share of an atom's norm; once is enough (Kahan, in Parlett
1980)."""

TIE = 1e-12
"""Float64 correlations that differ by less than this share are equal, and the atom of the lowest index is selected."""
