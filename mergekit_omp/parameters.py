"""The recipe parameters that ``omp`` and every ``omp_<method>`` add to the inner method's own."""

from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ByteSize, Field, FiniteFloat, StrictBool


class Reconstruction(str, Enum):
    """How the codes of a token become its row."""

    REGRESSION = "regression"  # from the donor's row and the model's own pieces of the token, corrected by the codes
    COMBINATION = "combination"  # the codes' combination of the model's rows: the paper's, and mergekit-tokensurgeon's


class OmpParameters(BaseModel, frozen=True):
    """What a recipe can set under ``parameters:``, globally, per slice or per model.

    The one place where our parameters are defined: mergekit's parameter specs, the checks of a recipe and the tables
    in the documentation are derived from these fields. Names follow ``mergekit-tokensurgeon``'s flags where they mean
    the same.
    """

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
    magikarp: StrictBool = Field(
        default=False, description="Leave under-trained tokens aside: they are neither anchors nor approximated."
    )
    memory_budget: ByteSize | None = Field(
        default=None,
        description="The most memory that a solve may take on its device beside the matrices, such as `8GiB`; the "
        "default is a share of what is free.",
    )
    new_vocab_noise: Annotated[FiniteFloat, Field(ge=0)] = Field(
        default=0.0, description="Standard deviation of Gaussian noise added to approximated rows."
    )
    new_vocab_scale: FiniteFloat = Field(default=1.0, description="Factor on approximated rows.")

    @classmethod
    def from_bound(cls, bound: dict[str, Any]) -> "OmpParameters":
        """Our part of the parameters that mergekit has bound to one input of one tensor."""
        return cls(**{name: bound[name] for name in cls.model_fields})
