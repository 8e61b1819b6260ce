"""The options of a healing: the keys of a ``heal.yml`` and the flags of ``mergekit-omp heal``."""

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, FiniteFloat, StrictBool, ValidationError

from mergekit_omp.errors import OmpError

DEFAULT_MINUTES = 10.0


class Objective(str, Enum):
    """What the training minimises."""

    KL = "kl"  # the divergence from the base's distribution over the output's tokens
    NEXT_TOKEN = "next-token"  # the cross-entropy of the text


class Train(str, Enum):
    """Which parameters are trained."""

    ROWS = "rows"  # the vocabulary matrices
    LORA = "lora"  # low-rank adapters of all linear layers of the body
    ROWS_AND_LORA = "rows+lora"
    FULL = "full"


LEARNING_RATES = {Train.ROWS: 2e-4, Train.LORA: 1e-3, Train.ROWS_AND_LORA: 1e-3, Train.FULL: 2e-5}
ROWS_SHARE = 0.2
"""The learning rate of vocabulary rows beside adapters, as a share of theirs: rows keep what they have learned."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class HealOptions(BaseModel, frozen=True, extra="forbid"):
    """What to heal, with which texts, for how long, and how."""

    model: str = Field(description="The transplanted model: a folder or a name on the hub.")
    out: str = Field(description="The output folder, new or empty.")
    base: str | None = Field(
        default=None,
        description="The model that MODEL was before the transplant.  [default: from the record of MODEL]",
    )
    text: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        default=(),
        description="A text file, or a .jsonl file with a `text` in each line, to train on; may be repeated.",
    )
    generate: StrictBool | None = Field(
        default=None, description="Let the base write the texts to train on.  [default: without --text]"
    )
    minutes: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        default=None, description=f"How long to generate and train.  [default: {DEFAULT_MINUTES:g} without --tokens]"
    )
    tokens: Annotated[int, Field(gt=0, strict=True)] | None = Field(
        default=None, description="How many tokens to train on, instead of --minutes."
    )
    objective: Objective = Field(
        default=Objective.KL,
        description="What to minimise: the divergence from the base's distribution over the output's tokens, or the "
        "cross-entropy of the text.",
    )
    train: Train = Field(
        default=Train.ROWS_AND_LORA,
        description="What to train: the vocabulary rows, low-rank adapters of all linear layers, both, or all "
        "parameters.",
    )
    rank: Annotated[int, Field(ge=1, strict=True)] = Field(default=16, description="The rank of the adapters.")
    lr: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        default=None,
        description="The peak learning rate; rows beside adapters get a fifth of it.  [default: "
        + ", ".join(f"{rate:g} for {train.value}" for train, rate in LEARNING_RATES.items())
        + "]",
    )
    device: str = Field(default="cpu", description="Where to train: cpu, cuda, cuda:1, …")
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16)$")] = Field(
        default="bfloat16", description="The type that the models compute in: float32 or bfloat16."
    )
    seed: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=0, description="The seed of everything random: the order of texts, generated texts, adapters."
    )
    save_on_interrupt: StrictBool = Field(
        default=False, description="When interrupted, write the best state so far instead of nothing."
    )
    trust_remote_code: StrictBool = Field(default=False, description="Let models run code of their own.")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else LEARNING_RATES[self.train]

    @property
    def seconds(self) -> float | None:
        """How long to generate and train; None where tokens bound the run."""
        return None if self.tokens else (self.minutes or DEFAULT_MINUTES) * 60


def make_options(values: Mapping[Any, Any], place: str) -> HealOptions:
    """Check the keys and values of a healing.

    Args:
        values: by key.
        place: where they come from, for messages.

    Raises:
        OmpError: an unknown key, an impossible value, a missing key, or two keys that exclude each other.
    """
    from mergekit_omp.recipe.keys import did_you_mean  # which imports mergekit, too slow for a command's help

    known = HealOptions.model_fields
    for key in values:
        if key not in known:
            raise OmpError(
                f"{place}: {key}: no such key{did_you_mean(str(key), known)}; a healing can have {', '.join(known)}."
            )
    try:
        options = HealOptions.model_validate(values)
    except ValidationError as error:
        raise _explained(error, place) from error
    if options.minutes is not None and options.tokens is not None:
        raise OmpError(f"{place}: minutes: {options.minutes:g} and tokens: {options.tokens}: write one of them.")
    if options.text and options.generate:
        raise OmpError(f"{place}: text and generate: true exclude each other: write one of them.")
    if options.generate is False and not options.text:
        raise OmpError(f"{place}: generate: false, but no text: name a text file, or leave generate out.")
    return options


def _explained(error: ValidationError, place: str) -> OmpError:
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return OmpError(f"{place}: {key} is missing: {_about(key)}")
    return OmpError(f"{place}: {key}: {first['input']!r} is not possible here ({first['msg']}). {_about(key)}")


def _about(key: str) -> str:
    return HealOptions.model_fields[key].description or ""
