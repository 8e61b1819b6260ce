"""Whether a model's files can be read, checked before any work: config.json, and every shard's header.

Only headers are read, so that it takes no time; what they declare must fit the file that follows.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import huggingface_hub
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from mergekit_omp.errors import OmpError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In mergekit's order of preference."""


def read_config(model: ModelReference, trust_remote_code: bool, key: str) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        OmpError: naming the recipe ``key`` that the model stands under, where there is none that mergekit can use.
    """
    path = model.model.path
    if not os.path.isdir(path) and (os.path.exists(path) or not _may_be_on_the_hub(path)):
        raise OmpError(
            f"{key}: {str(model)!r} is neither a folder nor a model's name on the hub; write <owner>/<name> or a path."
        )
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise OmpError(f"{key}: {model} has no config.json; name a model that has one.")
    try:
        config = model.config(trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise OmpError(
            f"{key}: config.json of {model} cannot be read ({first_line(error)}); download the model again."
        ) from error
    architectures = config.architectures or []
    if len(architectures) != 1:
        raise OmpError(
            f"{key}: architectures in config.json of {model} is {config.architectures}; "
            'mergekit needs exactly one, such as ["LlamaForCausalLM"].'
        )
    return config


def check_weights(model: ModelReference, options: MergeOptions, key: str) -> None:
    """Raise an OmpError unless every shard of a model is there and as long as its header says.

    Models on the hub are downloaded, as mergekit would a moment later.
    """
    if model.lora:
        return  # mergekit merges it into files of its own first
    try:
        folder = Path(model.local_path(cache_dir=options.transformers_cache))
    except Exception as error:  # whatever the hub's client raises
        raise OmpError(f"{key}: {model} cannot be downloaded ({first_line(error)}); try again.") from error
    name = weight_file(folder)
    if name is None:
        raise OmpError(
            f"{key}: {model} has no weights, neither {' nor '.join(WEIGHT_FILES)}, whole or in shards; "
            "name a model that has some."
        )
    index = folder / f"{name}.index.json"
    for shard in _shards(index, key) if index.exists() else [name]:
        _check_shard(folder / shard, key)


def weight_file(folder: Path) -> str | None:
    """The name of the weights that mergekit reads from a folder, None where there are none."""
    return next((n for n in WEIGHT_FILES if (folder / n).exists() or (folder / f"{n}.index.json").exists()), None)


def is_tokenizer_alone(model: ModelReference) -> bool:
    """Whether a model is a tokenizer's files without a configuration, hence without weights.

    False where the hub cannot be asked, so that whoever reads the model tells why it cannot be read.
    """
    folder = Path(model.model.path)
    if folder.is_dir():
        names = ("tokenizer_config.json", "tokenizer.json", "tekken.json")
        return not (folder / "config.json").exists() and any((folder / name).exists() for name in names)
    try:
        huggingface_hub.hf_hub_download(model.model.path, "config.json", revision=model.model.revision)
    except huggingface_hub.errors.LocalEntryNotFoundError:
        return False
    except huggingface_hub.errors.EntryNotFoundError:
        return True
    except Exception:  # no name on the hub, no network, no access
        return False
    return False


def first_line(error: Exception) -> str:
    """What an exception says, without the advice that follows."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    heading = lines[:1] if not lines or not lines[0].endswith(":") else lines[:2]
    return " ".join(heading).rstrip(" .:") or type(error).__name__


def _may_be_on_the_hub(path: str) -> bool:
    return bool(path) and path.count("/") <= 1 and path[0] not in "/~."


def _shards(index: Path, key: str) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(names.values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OmpError(
            f"{key}: {index} is not an index of weights ({first_line(error)}); download the model again."
        ) from error
    for shard in shards:
        if not _is_inside(shard):
            raise OmpError(
                f"{key}: {index} names the shard {shard!r}, which is no file in the model's folder; "
                "do not use this model unless you know why."
            )
    return shards


def _is_inside(shard: Any) -> bool:
    """Whether a shard's name stays in the folder, on every system."""
    if not isinstance(shard, str) or not shard:
        return False
    windows = PureWindowsPath(shard)
    return not (PurePosixPath(shard).is_absolute() or windows.drive or windows.root or ".." in windows.parts)


def _check_shard(path: Path, key: str) -> None:
    if not path.is_file():
        raise OmpError(f"{key}: the shard {path} is missing; download the model again.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return
        problem = _problem_of_pickle(path)
    except (SafetensorError, OSError) as error:
        problem = first_line(error)
    if problem:
        raise OmpError(f"{key}: {path} cannot be read ({problem}); download the model again.")


def _problem_of_pickle(path: Path) -> str | None:
    """Read what a pickle holds, without its numbers, and refusing to run what it might say to run."""
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        return "it is no plain pickle of tensors"
    except (RuntimeError, EOFError, ValueError):
        return "it is truncated"
    return None
