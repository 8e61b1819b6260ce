"""Load a model, or its tokenizer alone, by the name that a command or a record gives."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from mergekit.common import ModelPath, ModelReference
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mergekit_omp.checkpoints.tokenizers import load_tokenizer
from mergekit_omp.errors import OmpError, failures_as


def reference_of(name: str | Path, key: str) -> ModelReference:
    """Read a model's name: a folder, or a model on the hub as recipes write it, ``<owner>/<name>@<revision>``.

    Args:
        name: the name; a folder is taken as it is, whatever characters its name has.
        key: option or recipe key of the name, for messages.

    Raises:
        OmpError: if it is no name of a model, or names an adapter too.
    """
    if os.path.exists(name):
        return ModelReference(model=ModelPath(path=str(name)))
    with failures_as(lambda reason: f"{key}: {name} names no model ({reason}); write <owner>/<name> or a path."):
        reference = ModelReference.parse(str(name))
    if reference.lora:
        raise OmpError(
            f"{key}: {name} is a model with an adapter, which only a merge can read; name the folder of the merged "
            "model, which mergekit wrote to its --lora-merge-cache."
        )
    return reference


def tokenizer_of(name: str | Path, trust_remote_code: bool = False, key: str = "MODEL") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a named model, as :func:`load_tokenizer` does for a model of a recipe."""
    return load_tokenizer(reference_of(name, key), trust_remote_code, key)


def load_model(
    name: str | Path, device: str, dtype: torch.dtype | str, trust_remote_code: bool, key: str = "MODEL"
) -> PreTrainedModel:
    """Load a named causal language model, in evaluation mode.

    Raises:
        OmpError: if it cannot be loaded; the message begins with ``key``.
    """
    reference = reference_of(name, key).model
    with failures_to_load(name, key):
        model = AutoModelForCausalLM.from_pretrained(
            reference.path, revision=reference.revision, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model.to(device).eval()  # type: ignore[arg-type]  # transformers' annotation of `to` lacks self


def empty_model(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Build a causal language model without its weights; raises what its constructor does."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def failures_to_load(name: str | Path, key: str) -> AbstractContextManager[None]:
    """Raise an OmpError that begins with ``key`` for whatever stops a causal language model from being loaded."""
    return failures_as(lambda reason: f"{key}: {name} cannot be loaded as a causal language model: {reason}.")
