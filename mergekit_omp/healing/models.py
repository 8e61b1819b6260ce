"""Load a transplanted model and its base, and check that they belong together."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from mergekit_omp.checkpoints.files import read_config
from mergekit_omp.checkpoints.models import empty_model, failures_to_load, reference_of, tokenizer_of
from mergekit_omp.errors import OmpError
from mergekit_omp.healing.alignment import Reader
from mergekit_omp.healing.options import HealOptions
from mergekit_omp.report.record import RECORD_FILE
from mergekit_omp.vocabulary.tokens import read_vocabulary


def teacher_of(options: HealOptions, record: Mapping[str, Any]) -> str:
    """Name the base: that of the options, or of an earlier healing, or the one input of the merge.

    Args:
        options: the options.
        record: of the model; {} if it has none.

    Raises:
        OmpError: there is no record, or a record of a merge of several inputs.
    """
    if options.base is not None:
        return options.base
    if not record:
        raise OmpError(f"base: {options.model} has no {RECORD_FILE} that tells its base; name it with --base.")
    if "heal" in record:
        return record["heal"]["base"]
    inputs = [model["name"] for model in record.get("models", ()) if "input" in model["roles"]]
    if len(inputs) != 1:
        raise OmpError(
            f"base: {options.model} was merged from {len(inputs)} inputs ({', '.join(inputs)}), and a merge has no "
            "base that it should agree with; heal the inputs before they are merged, or name one with --base."
        )
    return inputs[0]


def load_reader(name: str, trust_remote_code: bool, key: str) -> Reader:
    """Load a model's tokenizer.

    Raises:
        OmpError: it cannot be read, or has neither bos nor eos.
    """
    tokenizer = tokenizer_of(name, trust_remote_code, key)
    vocabulary = read_vocabulary(tokenizer)
    start_id = vocabulary.roles.get("bos", vocabulary.roles.get("eos"))
    if start_id is None:
        raise OmpError(f"{key}: {name} has neither a bos nor an eos token; name a model with one.")
    return Reader(tokenizer, vocabulary, start_id)


def check_bodies(model: str, base: str, trust_remote_code: bool) -> None:
    """Check, from their configurations, that both models are the same but for their vocabulary matrices.

    Raises:
        OmpError: a model that cannot be read, or a tensor that differs in shape.
    """
    shapes = _shapes(model, trust_remote_code, "model")
    of_base = _shapes(base, trust_remote_code, "base")
    for name in [*of_base, *shapes]:
        if shapes.get(name) != of_base.get(name):
            raise OmpError(
                f"base: {base} is not the base of {model}: {name} has the shape {_written(of_base.get(name))} in it, "
                f"and {_written(shapes.get(name))} in the model. Name the model that was given the new tokenizer."
            )


def check_rows(reader: Reader, model: PreTrainedModel, name: str, key: str) -> None:
    """Raise an OmpError where a tokenizer has ids that the model has no row for."""
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if reader.vocabulary.size > rows:
        raise OmpError(
            f"{key}: {name} has {rows} rows, but its tokenizer has ids up to {reader.vocabulary.size - 1}: they do "
            "not belong together; name another model."
        )


def _shapes(name: str, trust_remote_code: bool, key: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors but the vocabulary matrices."""
    config = read_config(reference_of(name, key), trust_remote_code, key)
    with failures_to_load(name, key):
        model = empty_model(config, trust_remote_code)
    rows = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if id(module) in rows
        for name, _ in module.named_parameters()
    }
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters() if name not in matrices}


def _written(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else "×".join(map(str, shape))
