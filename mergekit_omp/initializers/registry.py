"""The initializers that ``approximation:`` can name, and what each needs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mergekit_omp.initializers import focus, tokalign, tokensurgeon, wechsel, zett
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.omp import omp
from mergekit_omp.parameters import Approximation, OmpParameters, Reconstruction


@dataclass(frozen=True)
class Initializer:
    """One way to make the rows of new tokens.

    Attributes:
        prepare: does what does not depend on the model's matrix, once for the input embedding and the LM head.
        check: raises an OmpError, whose sentence begins with the place in the recipe, for parameters that will not do.
        solves: whether it needs OMP's codes.
        reads_donor: whether it needs the donor's matrix, not counting the solve for the codes.
        reads_both: whether it needs the model's input embedding and LM head for each of them.
        reads_configs: whether it needs the configurations of the donor and of the model.
        any_shape: whether it can make the entries of a bias, too; the others' are the mean of the anchors'.
    """

    prepare: Callable[[NewTokens], RowFunction]
    check: Callable[[OmpParameters, str], None] = lambda parameters, place: None
    solves: bool = False
    reads_donor: Callable[[OmpParameters], bool] = lambda parameters: False
    reads_both: bool = False
    reads_configs: bool = False
    any_shape: bool = False

    def rows(self, new: NewTokens) -> RowFunction:
        """How the rows of new tokens are made, for a tensor [R, ...] of any shape."""
        make = self.prepare(new)

        def of_any_shape(weight: Tensor, is_head: bool) -> Tensor:
            if weight.ndim == 2 or self.any_shape:
                return make(weight, is_head)
            return new.mean_row(weight).expand(len(new.problem.target_ids), *weight.shape[1:])

        return of_any_shape


def _always(_parameters: OmpParameters) -> bool:
    return True


_MERGEKIT = {
    Approximation.COMMON_INTERPOLATION: Initializer(tokensurgeon.common_interpolation, reads_donor=_always),
    Approximation.SUBWORD: Initializer(tokensurgeon.subword),
    Approximation.MEAN: Initializer(tokensurgeon.as_mergekit),
    Approximation.ZERO: Initializer(tokensurgeon.as_mergekit),
    Approximation.RANDN: Initializer(tokensurgeon.as_mergekit),
    Approximation.JOHN_HEWITT: Initializer(tokensurgeon.john_hewitt),
    Approximation.LANDMARK_PCA: Initializer(tokensurgeon.as_mergekit, reads_donor=_always),
    Approximation.STB: Initializer(tokensurgeon.stb, reads_donor=_always),
    Approximation.MP_ROPE: Initializer(tokensurgeon.mp_rope, reads_donor=_always, reads_configs=True),
}

INITIALIZERS: dict[Approximation, Initializer] = {
    Approximation.OMP: Initializer(
        omp,
        solves=True,
        reads_donor=lambda parameters: parameters.reconstruction is Reconstruction.REGRESSION,
        any_shape=True,
    ),
    **_MERGEKIT,
    Approximation.FOCUS: Initializer(focus.focus, focus.check),
    Approximation.WECHSEL: Initializer(wechsel.wechsel, wechsel.check),
    Approximation.ZETT: Initializer(zett.zett, zett.check, reads_both=True),
    Approximation.TOKALIGN: Initializer(tokalign.tokalign, tokalign.check),
}


def initializer_of(parameters: OmpParameters) -> Initializer:
    """The initializer that a recipe's parameters ask for."""
    return INITIALIZERS[parameters.approximation]


def needs_donor(parameters: OmpParameters) -> bool:
    """Whether rows of the model that the new tokenizer comes from are needed."""
    initializer = initializer_of(parameters)
    return initializer.solves or initializer.reads_donor(parameters) or parameters.magikarp


def without_donor() -> list[str]:
    """The names of the initializers that a tokenizer without a model is enough for."""
    return [each.value for each in INITIALIZERS if not needs_donor(OmpParameters(approximation=each))]
