"""Register the initializers that ``approximation:`` can name, with their requirements."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mergekit_omp.initializers import focus, tokalign, tokensurgeon, wechsel, zett
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.omp import omp
from mergekit_omp.parameters import Approximation, OmpParameters, Reconstruction


@dataclass(frozen=True)
class Initializer:
    """An initializer and its requirements.

    Attributes:
        prepare: computes everything that does not depend on the model's matrix, once for the input embedding and LM
            head.
        check: raises an OmpError for invalid parameters, given them and their path in the recipe.
        solves: whether it needs sparse codes.
        reads_donor: whether it needs the donor's matrix, apart from the solve.
        reads_both: whether it needs the input embedding and the LM head to make rows of either.
        reads_configs: whether it needs the configurations of the donor and of the model.
        any_shape: whether it can make entries of a bias; otherwise they are the mean of the anchors' entries.
    """

    prepare: Callable[[NewTokens], RowFunction]
    check: Callable[[OmpParameters, str], None] = lambda parameters, place: None
    solves: bool = False
    reads_donor: Callable[[OmpParameters], bool] = lambda parameters: False
    reads_both: bool = False
    reads_configs: bool = False
    any_shape: bool = False

    def rows(self, new: NewTokens) -> RowFunction:
        """Prepare the initializer; the returned function makes rows for a tensor (R, …) of any shape."""
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
    Approximation.FOCUS: Initializer(focus.focus, focus.check_focus),
    Approximation.WECHSEL: Initializer(wechsel.wechsel, wechsel.check_wechsel),
    Approximation.ZETT: Initializer(zett.zett, zett.check_zett, reads_both=True),
    Approximation.TOKALIGN: Initializer(tokalign.tokalign, tokalign.check_tokalign),
}


def initializer_of(parameters: OmpParameters) -> Initializer:
    """Return the initializer that the parameters select."""
    return INITIALIZERS[parameters.approximation]


def needs_donor(parameters: OmpParameters) -> bool:
    """Tell whether rows of the donor are needed."""
    initializer = initializer_of(parameters)
    return initializer.solves or initializer.reads_donor(parameters) or parameters.magikarp


def without_donor() -> list[str]:
    """Return the names of initializers that work with a tokenizer without a model."""
    return [name.value for name in INITIALIZERS if not needs_donor(OmpParameters(approximation=name))]
