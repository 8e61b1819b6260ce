"""The names of the merge methods, and the recipe parameters that they add to the inner method's own."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ByteSize, Field, FiniteFloat, StrictBool

from mergekit_omp.errors import OmpError

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethodSpec

TRANSPLANT = "omp"
PREFIX = "omp_"


def is_ours(method_name: object) -> bool:
    """Whether a recipe's ``merge_method`` belongs to this package."""
    return isinstance(method_name, str) and (method_name == TRANSPLANT or method_name.startswith(PREFIX))


class Reconstruction(str, Enum):
    """How the codes of a token become its row."""

    REGRESSION = "regression"  # from the donor's row and the model's own pieces of the token, corrected by the codes
    COMBINATION = "combination"  # the codes' combination of the model's rows: the paper's, and mergekit-tokensurgeon's


class Approximation(str, Enum):
    """Where the rows of new tokens come from."""

    OMP = "omp"
    COMMON_INTERPOLATION = "common_interpolation"
    SUBWORD = "subword"
    MEAN = "mean"
    ZERO = "zero"
    RANDN = "randn"
    JOHN_HEWITT = "john_hewitt"
    LANDMARK_PCA = "landmark_pca"
    STB = "stb"
    MP_ROPE = "mp_rope"
    FOCUS = "focus"
    WECHSEL = "wechsel"
    ZETT = "zett"
    TOKALIGN = "tokalign"


class WeightScheme(str, Enum):
    """How `common_interpolation` weighs a token's nearest anchors."""

    DISTANCE_PROPORTIONAL = "distance_proportional"
    BARYCENTRIC = "barycentric"
    LEAST_SQUARES = "least_squares"


class SubwordMethod(str, Enum):
    """How `subword` makes one row of those of a token's pieces."""

    MEAN = "mean"
    SUM = "sum"
    WEIGHTED_MEAN = "weighted_mean"
    FIRST_LAST = "first_last"


class Numerals(str, Enum):
    """Where the rows of new tokens that are numbers, such as `123`, come from."""

    APPROXIMATE = "approximate"  # as those of all other new tokens
    DIGITS = "digits"  # from the model's own rows of the digits


class CopyRows(str, Enum):
    """Whether an input takes the rows of tokens that it lacks unchanged from another model."""

    AUTO = "auto"  # where the rows of shared tokens show that both share a space
    ALWAYS = "always"  # wherever both have the same width
    NEVER = "never"


class OmpParameters(BaseModel, frozen=True):
    """What a recipe can set under ``parameters:``, globally, per slice or per model.

    The one place where our parameters are defined: mergekit's parameter specs, the checks of a recipe and the tables
    in the documentation are derived from these fields. Names follow ``mergekit-tokensurgeon``'s flags where they mean
    the same.
    """

    approximation: Approximation = Field(
        default=Approximation.OMP,
        description="Where the rows of new tokens come from: `omp`, or a method to compare it with (docs/methods.md).",
    )
    k: Annotated[int, Field(ge=1, strict=True)] = Field(
        default=64, description="Sparsity: the largest number of anchors that one new token is a combination of."
    )
    normalize_atoms: StrictBool = Field(
        default=False, description="Choose anchors by the cosine with the residual instead of the inner product."
    )
    reconstruction: Reconstruction = Field(
        default=Reconstruction.REGRESSION,
        description="How codes become rows: `regression` also uses the donor's row and the model's own pieces of the "
        "token; `combination` is the paper's Σ cᵢ bᵢ, as mergekit-tokensurgeon has it.",
    )
    numerals: Numerals = Field(
        default=Numerals.APPROXIMATE,
        description="Rows of new numbers such as `123`: `digits` makes them from the model's own digits, with logits "
        "lowered by ln 10 for each digit after the first; the whole model is loaded for it, to read a text.",
    )
    copy_rows: CopyRows = Field(
        default=CopyRows.AUTO,
        description="Rows of new tokens that another model of the recipe has: `auto` copies them where both models "
        "share a space (fine-tunes of one base), as the rows of their shared tokens show; `always` wherever both have "
        "the same width; `never` approximates them all.",
    )
    magikarp: StrictBool = Field(
        default=False, description="Leave under-trained tokens aside: they are neither anchors nor approximated."
    )
    memory_budget: ByteSize | None = Field(
        default=None,
        description="The most memory that a solve may take on its device beside the matrices, such as `8GiB`; the "
        "default is 60 % of what is free. On a CPU that holds two bytes for each pair of anchors it is several times "
        "as fast.",
    )
    new_vocab_noise: Annotated[FiniteFloat, Field(ge=0)] = Field(
        default=0.0, description="Standard deviation of Gaussian noise added to approximated rows."
    )
    new_vocab_scale: FiniteFloat = Field(default=1.0, description="Factor on approximated rows.")

    weight_scheme: WeightScheme = Field(
        default=WeightScheme.DISTANCE_PROPORTIONAL,
        description="For `common_interpolation`: how the nearest anchors are weighed.",
    )
    cosine_similarity: StrictBool = Field(
        default=False, description="For `common_interpolation`: nearest by the cosine, not by the distance."
    )
    subword_method: SubwordMethod = Field(
        default=SubwordMethod.MEAN, description="For `subword`: how the rows of a token's pieces become one."
    )
    corpus: str | None = Field(
        default=None, description="For `focus` and `tokalign`: a text file to learn token vectors from."
    )
    vectors: str | None = Field(
        default=None,
        description="For `focus`: vectors of the output's tokens. For `wechsel`: of words of its language.",
    )
    source_vectors: str | None = Field(
        default=None, description="For `wechsel`: vectors of words of the model's language."
    )
    dictionary: str | None = Field(
        default=None, description="For `wechsel`: a file with a word and its translation in each line."
    )
    hypernetwork: str | None = Field(
        default=None, description="For `zett`: the hypernetwork's checkpoint, a folder or a name on the hub."
    )
    token_map: str | None = Field(
        default=None, description="For `tokalign`: a JSON file that names a token of the model for each new one."
    )

    @classmethod
    def from_bound(cls, bound: dict[str, Any]) -> "OmpParameters":
        """Our part of the parameters that mergekit has bound to one input of one tensor."""
        return cls(**{name: bound[name] for name in cls.model_fields})


def check_names_are_free(name: str, inner: "MergeMethodSpec") -> None:
    """Raise an OmpError where a parameter of the inner method of ``name`` has the name of one of ours."""
    clash = sorted({parameter.name for parameter in inner.parameters} & set(OmpParameters.model_fields))
    if clash:
        raise OmpError(
            f"merge_method: {name} is not available, since {inner.name} has parameters of its own named "
            f"{', '.join(clash)}, which mean other things here; use {inner.name} on transplanted models."
        )
