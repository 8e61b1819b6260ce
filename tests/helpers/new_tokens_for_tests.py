"""Build the inputs of an initializer from two tokenizers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.base import NewTokens
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import pose_problem
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.tokens import read_vocabulary


def new_tokens(
    tokenizer: PreTrainedTokenizerBase,
    output_tokenizer: PreTrainedTokenizerBase,
    parameters: dict[str, Any],
    approximate: Sequence[str] = (),
    **more: Any,
) -> NewTokens:
    """Return tokens of ``output_tokenizer`` that ``tokenizer`` lacks, and ``approximate``, as new tokens."""
    output, model = read_vocabulary(output_tokenizer), read_vocabulary(tokenizer)
    match = match_vocabularies(output, model)
    ids = output_tokenizer.get_vocab()
    match = match.without(torch.tensor([ids[text] for text in approximate], dtype=torch.int64))
    problem = pose_problem(match, match_vocabularies(output, output))
    alignment = Alignment("model", tokenizer, model, match, match)
    return NewTokens(alignment, problem, output, output_tokenizer, OmpParameters(**parameters), **more)


def refusal_by(check: Callable[[OmpParameters, str], None], **given: object) -> str:
    """Return the message of an initializer's check for invalid parameters."""
    with pytest.raises(OmpError) as raised:
        check(OmpParameters(**{name: str(value) for name, value in given.items()}), "parameters")
    return raised.value.message
