"""Define the names of the merge methods and the recipe parameters that they add to those of the inner method."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ByteSize, Field, FiniteFloat, StrictBool

from mergekit_omp.errors import OmpError

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethodSpec

TRANSPLANT = "omp"
PREFIX = "omp_"


def is_ours(method_name: object) -> bool:
    """Tell whether a recipe's ``merge_method`` belongs to this package."""
    return isinstance(method_name, str) and (method_name == TRANSPLANT or method_name.startswith(PREFIX))


class Reconstruction(str, Enum):
    """How a new token's row is computed from its sparse code."""

    REGRESSION = "regression"  # ridge regression on the donor's row and the pieces of the token, corrected by the code
    COMBINATION = "combination"  # Σ cᵢ bᵢ of the model's rows, as in the paper and mergekit-tokensurgeon


class Approximation(str, Enum):
    """The initializer: how rows of new tokens are made."""

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
    """How `common_interpolation` weights the nearest anchors of a token."""

    DISTANCE_PROPORTIONAL = "distance_proportional"
    BARYCENTRIC = "barycentric"
    LEAST_SQUARES = "least_squares"


class SubwordMethod(str, Enum):
    """How `subword` combines the rows of a token's pieces."""

    MEAN = "mean"
    SUM = "sum"
    WEIGHTED_MEAN = "weighted_mean"
    FIRST_LAST = "first_last"


class Numerals(str, Enum):
    """How rows of new tokens that are numbers, such as `123`, are made."""

    APPROXIMATE = "approximate"  # like the rows of all other new tokens
    DIGITS = "digits"  # from the model's own rows of the digits


class CopyRows(str, Enum):
    """Whether rows of new tokens are copied from another model of the recipe."""

    AUTO = "auto"  # if the rows of shared tokens show that both models share a space
    ALWAYS = "always"  # if both models have the same hidden size
    NEVER = "never"


class UnsafeTokens(str, Enum):
    """What becomes of approximated rows that the audit flags."""

    KEEP = "keep"  # they stay as they are
    MEAN = "mean"  # the mean row
    PIECES = "pieces"  # the mean of the rows of the token's pieces


class OmpParameters(BaseModel, frozen=True):
    """Recipe parameters under ``parameters:``, which can be set globally, per slice or per model.

    These fields define the parameters: mergekit's parameter specs, the checks of a recipe and the tables in the
    documentation are derived from them. Parameters with the meaning of a ``mergekit-tokensurgeon`` flag have its name.

    Example:
        >>> from mergekit_omp.parameters import OmpParameters
        >>> parameters = OmpParameters(k=32, memory_budget="8GiB")
        >>> parameters.approximation.value, parameters.k, int(parameters.memory_budget)
        ('omp', 32, 8589934592)
    """

    approximation: Approximation = Field(
        default=Approximation.OMP,
        description="Initializer of new tokens: `omp`, or a method to compare it with (docs/methods.md).",
    )
    k: Annotated[int, Field(ge=1, strict=True)] = Field(
        default=64, description="Sparsity: maximum number of anchors per new token."
    )
    normalize_atoms: StrictBool = Field(
        default=False, description="Select anchors by their cosine with the residual instead of the inner product."
    )
    reconstruction: Reconstruction = Field(
        default=Reconstruction.REGRESSION,
        description="How rows are computed from sparse codes: `regression` also uses the donor's row and the "
        "pieces of the token in the model's own tokenizer; `combination` is the paper's Σ cᵢ bᵢ, as in "
        "mergekit-tokensurgeon.",
    )
    numerals: Numerals = Field(
        default=Numerals.APPROXIMATE,
        description="Rows of new numbers such as `123`: `digits` makes them from the model's rows of the digits, with "
        "logits lowered by ln 10 for each digit after the first. It loads the complete model to read a text.",
    )
    copy_rows: CopyRows = Field(
        default=CopyRows.AUTO,
        description="Rows of new tokens that another model of the recipe has: `auto` copies them if both models share "
        "a space (fine-tunes of one base), which is tested on their shared tokens; `always` copies them if both "
        "models have the same hidden size; `never` approximates them.",
    )
    magikarp: StrictBool = Field(
        default=False,
        description="Exclude under-trained tokens, found by mergekit's Magikarp test: "
        "they are neither anchors nor targets.",
    )
    memory_budget: ByteSize | None = Field(
        default=None,
        description="Memory limit of the solver, excluding its inputs, such as `8GiB`; the default is 60 % of the "
        "free memory. On a CPU, the solver is several times faster with two bytes for every pair of anchors.",
    )
    unsafe_tokens: UnsafeTokens = Field(
        default=UnsafeTokens.KEEP,
        description="Rows of new tokens that are far likelier than their bytes allow, or far from what the rows of "
        "their pieces predict, as a donor can plant them (docs/audit.md): `keep` warns, by what the rows alone tell; "
        "`mean` and `pieces` load the complete model to read texts, and give flagged tokens the mean row, or the mean "
        "of the rows of their pieces.",
    )
    new_vocab_noise: Annotated[FiniteFloat, Field(ge=0)] = Field(
        default=0.0, description="Standard deviation of Gaussian noise added to approximated rows."
    )
    new_vocab_scale: FiniteFloat = Field(default=1.0, description="Factor by which approximated rows are scaled.")

    weight_scheme: WeightScheme = Field(
        default=WeightScheme.DISTANCE_PROPORTIONAL,
        description="For `common_interpolation`: how the nearest anchors are weighted.",
    )
    cosine_similarity: StrictBool = Field(
        default=False,
        description="For `common_interpolation`: find the nearest anchors by cosine instead of distance.",
    )
    subword_method: SubwordMethod = Field(
        default=SubwordMethod.MEAN, description="For `subword`: how the rows of a token's pieces are combined."
    )
    corpus: str | None = Field(
        default=None, description="For `focus` and `tokalign`: a text file to train token vectors on."
    )
    vectors: str | None = Field(
        default=None,
        description="For `focus`: vectors of the output tokens. For `wechsel`: vectors of words of the output "
        "language.",
    )
    source_vectors: str | None = Field(
        default=None, description="For `wechsel`: vectors of words of the model's language."
    )
    dictionary: str | None = Field(
        default=None, description="For `wechsel`: a file with a word and its translation on each line."
    )
    hypernetwork: str | None = Field(
        default=None, description="For `zett`: the checkpoint of the hypernetwork, a folder or a hub id."
    )
    token_map: str | None = Field(
        default=None, description="For `tokalign`: a JSON file that maps each new token to a token of the model."
    )

    @classmethod
    def from_bound(cls, bound: dict[str, Any]) -> "OmpParameters":
        """Select this package's parameters from those that mergekit has bound to one input of one tensor."""
        return cls(**{name: bound[name] for name in cls.model_fields})


def check_names_are_free(name: str, inner: "MergeMethodSpec") -> None:
    """Raise an OmpError if the inner method of ``name`` has a parameter with the name of one of this package's."""
    clash = sorted({parameter.name for parameter in inner.parameters} & set(OmpParameters.model_fields))
    if clash:
        raise OmpError(
            f"merge_method: {name} is not available, since the parameters {', '.join(clash)} of {inner.name} have "
            f"another meaning here; use {inner.name} on transplanted models."
        )
