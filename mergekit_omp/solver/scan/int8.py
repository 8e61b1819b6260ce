"""Screen atoms in 8-bit integers, which some CPUs multiply several times faster than float32 numbers.

Letters in shapes: B targets, N atoms, d dimensions.
"""

import math
from functools import cache

import torch
from torch import Tensor

from mergekit_omp.solver.scan.screening import TINY, Correlations, Screen

LEVELS = 126.5
"""Quantisation steps from zero to the largest magnitude of a row; with the dither, integers stay within ±127."""

ZERO_POINT = 128
"""Zero point of the left factor, which oneDNN takes as unsigned integers."""

CERTAINTY = math.sqrt(2 * math.log(2e20))
"""Number of standard deviations t that a sub-Gaussian sum of rounding errors exceeds with probability 10⁻²⁰, from
2 exp(-t² / 2)."""

DIGITS = [127, 1, 0, 0]
"""Entries of every atom in the extra columns, which add a number in base 127 to all correlations of a residual."""


class Int8Screen(Screen):
    """Atoms and residuals rounded to 8 bits.

    A fixed rotation, which preserves inner products, first spreads large coordinates over all. Then each row x is
    divided by its own step Δ and rounded with a random dither uᵢ in [0, 1) per coordinate, which is subtracted again:
    x̂ᵢ = Δ (⌊xᵢ / Δ + uᵢ⌋ - uᵢ + ½). The errors of the coordinates are then independent and uniform in ±Δ/2 for
    every x (Schuchman 1964). Sums of them, and so ⟨r, a⟩ - ⟨r̂, â⟩, are sub-Gaussian with the variance of uniform
    numbers,

        (Δᵣ² ‖a‖² + ‖r̂‖² Δₐ²) / 12,

    and exceed :data:`CERTAINTY` standard deviations once in 10²⁰ correlations. (The solve of a large pair estimates
    about 10¹¹.) As long as the bound holds, every choice is the exact one, so results do not depend on the dither.
    """

    def __init__(self, atoms: Tensor, norms: Tensor) -> None:
        super().__init__(atoms, norms)
        draw = torch.Generator().manual_seed(0)
        dim = atoms.shape[1]
        self._rotation = _rotation(dim, draw)
        self._dither, dither = torch.rand(2, dim, generator=draw)
        self._shift = 0.5 - dither
        self._shift_of_dither = (0.5 - self._dither) @ self._shift
        self._digits = torch.tensor(DIGITS, dtype=torch.float32)

        quantized = torch.empty(self.order.numel(), dim + len(DIGITS), dtype=torch.int8)
        quantized[:, dim:] = self._digits
        self._steps, self._bias = torch.empty(2, len(quantized))
        for places, part in self._parts():
            rounded, self._steps[places] = _round(self._rotate(part), dither)
            quantized[places, :dim] = rounded
            self._bias[places] = (rounded @ (0.5 - self._dither)) * self._steps[places]
        self._squares = torch.stack(self._largest(self._steps)).square_()
        self._zeros = torch.zeros(len(quantized), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(quantized, [64, quantized.shape[1]])

    def scan(self, residuals: Tensor, norms: Tensor) -> Correlations:
        """See :meth:`Screen.scan`."""
        quantized, steps = _round(self._rotate(residuals), self._dither)
        # The atoms' shift adds ⟨r̂, ½ - u⟩, the same for all atoms up to their steps: the extra columns add it.
        shift = quantized @ self._shift + self._shift_of_dither
        digits = _digits(shift)
        missed = shift - digits @ self._digits
        left = torch.empty(len(quantized), quantized.shape[1] + len(DIGITS), dtype=torch.uint8)
        left[:, : quantized.shape[1]] = quantized.add_(ZERO_POINT)
        left[:, quantized.shape[1] :] = digits + ZERO_POINT
        values = multiply(left, self._packed, self._steps, self._zeros, self._bias)
        # An upper bound on the norm of r̂ in steps, the unit of the values.
        norm = norms / steps + math.sqrt(residuals.shape[1])
        deviations = CERTAINTY / math.sqrt(12)
        # Factors of an atom's norm and of its step in the bound, whose squares add up.
        factors = torch.stack([deviations + self.summing * norm, deviations * norm + missed.abs()], dim=1)
        errors = (factors.square_() @ self._squares).add_(TINY).sqrt_()
        return Correlations(values.unflatten(1, self.order.shape), errors, steps, self.order)

    def _rotate(self, rows: Tensor) -> Tensor:
        left, right = self._rotation
        return (left @ (rows.unflatten(1, (len(left), len(right))) @ right)).flatten(1)


def _digits(numbers: Tensor) -> Tensor:
    """Write numbers (B,) as the nearest digits (B, len(DIGITS)) within ±127."""
    high = (numbers / DIGITS[0]).round().clamp(-127, 127)
    low = (numbers - DIGITS[0] * high).round().clamp(-127, 127)
    return torch.stack([high, low, torch.zeros_like(low), torch.zeros_like(low)], dim=1)


def _rotation(dim: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw two orthogonal matrices whose Kronecker product rotates d dimensions at about 2 √d products per coordinate.

    Each is a discrete Hartley transform with random signs: its entries have about the same size, so no coordinate
    stays large.
    """
    size = max(divisor for divisor in range(1, math.isqrt(dim) + 1) if dim % divisor == 0)
    left, right = (_hartley(n) * (torch.randint(0, 2, (n,), generator=draw) * 2 - 1) for n in (size, dim // size))
    return left, right.T.contiguous()


def _hartley(size: int) -> Tensor:
    """Return the discrete Hartley transform (size, size), which is symmetric and orthogonal."""
    places = torch.arange(size, dtype=torch.float64)
    angles = (places[:, None] * places % size) * (2 * math.pi / size)
    return ((angles.cos() + angles.sin()) / math.sqrt(size)).float()


def _round(rows: Tensor, dither: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (B, d) in place to whole numbers within ±127, with a ``dither`` (d,); return them and steps (B,)."""
    steps = (rows.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return rows.div_(steps[:, None]).add_(dither).floor_(), steps


def multiply(quantized: Tensor, packed: Tensor, steps: Tensor, zeros: Tensor, bias: Tensor) -> Tensor:
    """Multiply quantised rows with packed atoms: ⟨qᵦ, qₙ⟩ stepsₙ + biasₙ (B, N) in bfloat16, summed in integers."""
    return torch.ops.onednn.qlinear_pointwise(
        quantized, 1.0, ZERO_POINT, packed, steps, zeros, bias, 1.0, 0, torch.bfloat16, "none", [], ""
    )


@cache
def is_supported() -> bool:
    """Tell whether this CPU and this torch multiply 8-bit integers fast and exactly.

    Without VNNI instructions the pairwise sums saturate; the test multiplies the largest values to detect that.
    """
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return False
    quantized = torch.tensor([[127, -127], [127, 127]], dtype=torch.int8).repeat_interleave(32, dim=1)
    try:
        packed = torch.ops.onednn.qlinear_prepack(quantized, [2, 64])
        left = (quantized.int() + ZERO_POINT).to(torch.uint8)
        bias = torch.tensor([0.0, 1.0])
        product = multiply(left, packed, torch.full((2,), 1 / 127**2), torch.zeros(2, dtype=torch.int64), bias)
    except (AttributeError, RuntimeError):  # torch without oneDNN, or with another signature
        return False
    return torch.equal(product.float(), torch.tensor([[64.0, 1.0], [0.0, 65.0]]))
