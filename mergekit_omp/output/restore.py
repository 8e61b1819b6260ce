"""Restore the base's tokenizer in a transplanted model, which may have been trained since."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from mergekit_omp.checkpoints.architecture import vocabulary_role, vocabulary_size
from mergekit_omp.checkpoints.files import (
    PROCESSOR_FILES,
    check_weights,
    find_file,
    read_config,
    read_json,
    read_settings,
)
from mergekit_omp.checkpoints.models import reference_of
from mergekit_omp.checkpoints.tokenizers import load_tokenizer
from mergekit_omp.checkpoints.weights import open_checkpoint, vocabulary_matrix
from mergekit_omp.errors import OmpError, explained, failures_as
from mergekit_omp.output.code import copy_code
from mergekit_omp.output.staging import staged
from mergekit_omp.output.tokenizer import write_json
from mergekit_omp.report.record import base_of, read_record, unpack_rows
from mergekit_omp.vocabulary.tokens import read_vocabulary

RIDGE = 0.01
"""Regularisation, as a share of the mean diagonal of φᵀφ."""

_KEY = "--base"
_CONFIG = "config.json"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    *PROCESSOR_FILES,
)
"""What is the base's again."""


@dataclass(frozen=True)
class Restored:
    """What a restored matrix is made of.

    Attributes:
        name: of the tensor.
        kept: rows of shared tokens, as the model has them now.
        dropped: rows of tokens that the transplant dropped, from the base.
        moved: whether training changed shared rows, and the dropped ones were moved like them.
    """

    name: str
    kept: int
    dropped: int
    moved: bool


def restore(
    model: str | Path, out: str | Path, base: str | None = None, trust_remote_code: bool = False
) -> list[Restored]:
    """Give a transplanted model its base's tokenizer again.

    Rows of shared tokens are the model's as they are now. Rows that the transplant dropped are the base's, plus what a
    ridge regression on the base's rows predicts that training did to them; nothing is added where no shared row
    changed, so that an untouched transplant gives the base's matrices bit for bit.

    Args:
        model: the folder, with its record.
        out: a folder that is new or empty; appears when it is whole.
        base: the model that it was made from; the record's if None.
        trust_remote_code: let the base's tokenizer run code of its own.

    Raises:
        OmpError: the record does not say where rows come from, weights cannot be read, the base is another model, or
            the output cannot be written.
    """
    record, folder = read_record(model), Path(model)
    described = next(model for model in record["models"] if model["name"] == base_of(record))
    if "origins" not in described:
        raise OmpError(f"The record of {model} does not say where its rows come from; make the model again.")
    reference = reference_of(base or described["name"], _KEY)
    config = read_config(reference, trust_remote_code, _KEY)
    _check_base(reference, config, described, trust_remote_code)
    origins = unpack_rows(described["origins"])
    options = MergeOptions(trust_remote_code=trust_remote_code)
    names = {tensor["name"] for tensor in record["tensors"]}
    check_weights(reference_of(folder, "MODEL"), options, "MODEL")
    loader = LazyTensorLoader.from_disk(str(folder))
    if not loader.index.is_safetensors:
        raise OmpError(f"{model}: its weights are pickles; save it as safetensors with transformers first.")
    restored = []
    with explained(out), staged(out) as staging:
        for shard in sorted(set(loader.index.tensor_paths.values())):
            stored = sorted(name for name, path in loader.index.tensor_paths.items() if path == shard)
            tensors = {name: loader.get_tensor(name) for name in stored}
            for name in stored:
                if name in names:
                    base_tensor = _tensor_of_base(reference, name, options)
                    tensors[name], summary = _restore_rows(name, tensors[name], base_tensor, origins)
                    restored.append(summary)
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, staging / shard, {"format": "pt"}
            )
        _write_files(folder, staging, reference)
    return restored


def _check_base(
    base: ModelReference, config: PretrainedConfig, described: Mapping[str, Any], trust_remote_code: bool
) -> None:
    tokenizer = load_tokenizer(base, trust_remote_code, _KEY)
    rows = vocabulary_size(config)
    vocabulary = read_vocabulary(tokenizer)
    if rows is None or vocabulary.truncated(rows).fingerprint != described["vocabulary_sha256"]:
        raise OmpError(
            f"{_KEY}: {base} has another tokenizer than {described['name']}, which the model was made from; "
            "name that model."
        )


def _tensor_of_base(base: ModelReference, name: str, options: MergeOptions) -> Tensor:
    """Return the base's tensor of this name, or the one that it is tied to."""
    # Arbitrary errors of the hub client, of mergekit for an index, and of safetensors for a shard.
    with failures_as(
        lambda reason: f"{_KEY}: the weights of {base} cannot be read ({reason}); download the model again."
    ):
        checkpoint = open_checkpoint(base, options)
        if name not in checkpoint.index.tensor_paths:
            task, _ = vocabulary_matrix(base, vocabulary_role(name), options, _KEY)
            name = task.tensor
        return checkpoint.get_tensor(name)


def _restore_rows(name: str, tensor: Tensor, base_tensor: Tensor, origins: Tensor) -> tuple[Tensor, Restored]:
    """Give one tensor (V, ...) of the model the base's rows (R, ...)."""
    if tensor.shape[1:] != base_tensor.shape[1:]:
        raise OmpError(
            f"{_KEY}: {name} is {tuple(base_tensor.shape)} in the base and {tuple(tensor.shape)} in the model; "
            "name the model that this one was made from."
        )
    base_tensor = base_tensor.to(tensor.dtype)
    pairs = reversed(list(enumerate(origins[: len(tensor)].tolist())))
    id_of = {row: id_ for id_, row in pairs if 0 <= row < len(base_tensor)}  # the smallest id of each row
    rows, ids = torch.tensor(list(id_of), dtype=torch.int64), torch.tensor(list(id_of.values()), dtype=torch.int64)
    result = base_tensor.clone()
    result[rows] = tensor[ids]
    dropped = torch.ones(len(base_tensor), dtype=torch.bool)
    dropped[rows] = False
    moved = not torch.equal(tensor[ids], base_tensor[rows])
    if moved and dropped.any():
        before, dropped_rows = base_tensor[rows].float(), base_tensor[dropped].float()
        change = (tensor[ids].float() - before).flatten(start_dim=1)
        predicted = _regress(before.flatten(start_dim=1), change, dropped_rows.flatten(start_dim=1))
        result[dropped] = (dropped_rows + predicted.reshape(dropped_rows.shape)).to(result.dtype)
    return result, Restored(name, len(rows), int(dropped.sum()), moved)


def _regress(known: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Predict (M, D) for rows (M, F), by ridge regression of values (N, D) on known rows (N, F)."""
    constant = known.norm(dim=1).mean()
    known, rows = (torch.cat([x, constant.expand(len(x), 1)], dim=1).double() for x in (known, rows))
    gram = known.T @ known
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return (rows @ torch.linalg.solve(gram, known.T @ values.double())).float()


def _write_files(folder: Path, staging: Path, base: ModelReference) -> None:
    """Write the model's configuration with the base's tokens, the base's tokenizer, and the index of the shards."""
    config = read_json(folder / _CONFIG)
    _take_tokens(config, read_settings(base, _CONFIG))
    write_json(staging / _CONFIG, config)
    copy_code(config, reference_of(folder, "MODEL"), staging)
    for name in _FILES:
        if path := find_file(base, name):
            shutil.copyfile(path, staging / name)
            if name.endswith("_config.json"):
                copy_code(read_settings(base, name), base, staging)
    for index in folder.glob("*.index.json"):
        described = read_json(index)
        described["metadata"] = {"total_size": sum(path.stat().st_size for path in staging.glob("*.safetensors"))}
        write_json(staging / index.name, described)


def _take_tokens(settings: dict[str, Any], of_base: Mapping[str, Any]) -> None:
    """Set the sizes and ids of the vocabulary to those of the base, in place, nested ones included."""
    for key in [*settings, *(key for key in of_base if key not in settings)]:
        if isinstance(settings.get(key), dict):
            _take_tokens(settings[key], of_base.get(key) or {})
        elif key == "vocab_size" or key.endswith(("_token_id", "_token_index")):
            settings.pop(key, None)
            if key in of_base:
                settings[key] = of_base[key]
