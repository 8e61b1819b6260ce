"""Check a model's files before any work: config.json and the header of every shard.

Reading only the headers is fast; the tensors that they declare must fill the file.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import huggingface_hub
import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.utils.hub import cached_file

from mergekit_omp.errors import OmpError, failures_as, first_line

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weight files in mergekit's order of preference."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files that describe the processor of a model with image or audio input."""

_DECLARATIONS = {"added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"}
"""Keys of a tokenizer.json."""

_LONGEST_NAME = 255  # characters of a file's name; file systems allow no more

_VOCABULARY_MODULE = re.compile(r"\.(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|lm_head|embed_out)\.")

MOST_LAYERS = 10_000
"""Larger numbers of layers are certainly wrong; models have some hundreds at most."""

_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which a multimodal configuration describes its language model."""


def read_config(
    model: ModelReference, trust_remote_code: bool, key: str, *, is_donor: bool = False
) -> PretrainedConfig:
    """Read a model's configuration.

    Args:
        model: the model in the recipe.
        trust_remote_code: whether to run code that comes with the model.
        key: its recipe key, for messages.
        is_donor: whether only its vocabulary tensors are read, so that its type may be unknown to transformers.

    Returns:
        The configuration.

    Raises:
        OmpError: if there is no configuration that mergekit can use; the message names the recipe key.
    """
    path = model.model.path
    if not os.path.isdir(path) and (os.path.exists(path) or not _may_be_on_the_hub(path)):
        raise OmpError(
            f"{key}: {str(model)!r} is neither a folder nor a model's name on the hub; write <owner>/<name> or a path."
        )
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise OmpError(f"{key}: {model} has no config.json; name a model that has one.")
    read = config_of_donor if is_donor else ModelReference.config
    # transformers passes on arbitrary errors of its parsers.
    with failures_as(
        lambda reason: f"{key}: config.json of {model} cannot be read ({reason}); download the model again."
    ):
        _check_depth(PretrainedConfig.get_config_dict(path, revision=model.model.revision)[0])
        config = read(model, trust_remote_code)
    architectures = config.architectures
    if not (isinstance(architectures, list) and len(architectures) == 1 and isinstance(architectures[0], str)):
        raise OmpError(
            f"{key}: architectures in config.json of {model} is {config.architectures}; "
            'mergekit needs exactly one, such as ["LlamaForCausalLM"].'
        )
    return config


def _check_depth(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for an absurd number of layers, since configurations build lists with an entry for each."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in _LAYERS:
            layers = part.get(key)
            if isinstance(layers, int) and layers > MOST_LAYERS:
                raise ValueError(f"{key} is {layers}, and no model has more than {MOST_LAYERS}")


def config_of_donor(model: ModelReference, trust_remote_code: bool) -> PretrainedConfig:
    """Read the configuration of a model of which only the vocabulary tensors are needed, without running its code.

    A model type that transformers does not know has its own class in the repository. For such a model the plain values
    of config.json are used as data: they contain the sizes, and reading two matrices needs no class.

    Raises:
        Exception: an arbitrary error of transformers if config.json cannot be read.
    """
    data, _ = PretrainedConfig.get_config_dict(model.model.path, revision=model.model.revision)
    if trust_remote_code or data.get("model_type") in CONFIG_MAPPING or model.override_architecture:
        return model.config(trust_remote_code=trust_remote_code)
    return _as_config(data)


def _as_config(data: Mapping[str, Any]) -> PretrainedConfig:
    """Build a configuration from the plain values of config.json and of its language model's section."""
    values: dict[str, Any] = {"tie_word_embeddings": False}
    values |= {key: value for key, value in data.items() if not isinstance(value, dict)}
    part = next((data[key] for key in _LANGUAGE_PARTS if isinstance(data.get(key), dict)), None)
    if part is not None:
        values["text_config"] = _as_config({"tie_word_embeddings": values["tie_word_embeddings"], **part})
    return PretrainedConfig.from_dict(values)


def check_adapter(model: ModelReference, rows: int | None, options: MergeOptions, key: str) -> None:
    """Raise an OmpError unless mergekit can merge the adapter of ``model+adapter`` with PEFT.

    Args:
        model: a model with an adapter.
        rows: rows of the model's embedding according to its config.json.
        options: mergekit's options.
        key: recipe key of the model, for messages.
    """
    assert model.lora
    if not options.lora_merge_cache:
        raise OmpError(
            f"{key}: mergekit merges {model} into a folder first; name one with --lora-merge-cache <folder>."
        )
    try:
        names = ("adapter_config.json", "adapter_model.safetensors")
        _, weights = (_file_of(model.lora, name, options.transformers_cache) for name in names)
        with safe_open(weights, framework="pt") as adapter:
            shapes = {name: adapter.get_slice(name).get_shape() for name in adapter.keys()}  # noqa: SIM118, no mapping
    except FileNotFoundError as error:
        if str(error).endswith(".safetensors"):
            return  # pickles, which PEFT reads
        raise OmpError(f"{key}: {model.lora} has no adapter_config.json; name a PEFT adapter after the +.") from error
    except Exception as error:  # arbitrary errors of the hub client or the header parser
        raise OmpError(
            f"{key}: the adapter {model.lora} cannot be read ({first_line(error)}); download it again."
        ) from error
    other = {size for name, shape in shapes.items() if (size := _adapted_rows(name, shape)) not in (None, rows)}
    if other and rows is not None:
        raise OmpError(
            f"{key}: the adapter {model.lora} has {max(other)} rows for the vocabulary, and {model.model} has {rows}: "
            "it was trained after tokens had been added, but mergekit does not resize the model. Resize "
            f"the model to {max(other)} rows with transformers, merge the adapter with PEFT's merge_and_unload, save "
            "the result with the adapter's tokenizer, and name that folder."
        )


def _adapted_rows(name: str, shape: list[int]) -> int | None:
    """Return the vocabulary size of an adapter's tensor; None if it has no vocabulary axis."""
    if not _VOCABULARY_MODULE.search(name):
        return None
    if ".lora_embedding_A" in name:
        return shape[1]
    is_matrix = name.endswith(".weight") and ".lora_" not in name
    return shape[0] if is_matrix or ("head" in name and ".lora_B." in name) else None


def _file_of(path: ModelPath, name: str, cache_dir: str | None) -> Path:
    """Return the path of a file from a folder or from a model on the hub.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    folder = Path(path.path)
    if folder.is_dir():
        if not (folder / name).exists():
            raise FileNotFoundError(name)
        return folder / name
    try:
        return Path(huggingface_hub.hf_hub_download(path.path, name, revision=path.revision, cache_dir=cache_dir))
    except huggingface_hub.errors.LocalEntryNotFoundError:
        raise
    except huggingface_hub.errors.EntryNotFoundError as error:
        raise FileNotFoundError(name) from error


def check_weights(model: ModelReference, options: MergeOptions, key: str) -> None:
    """Raise an OmpError unless every shard of a model exists and is as long as its header declares.

    Downloads models from the hub, which mergekit would do later.
    """
    if model.lora:
        return  # see `check_adapter`; mergekit writes the merged model to new files
    try:
        folder = Path(model.local_path(cache_dir=options.transformers_cache))
    except Exception as error:  # arbitrary errors of the hub client
        raise OmpError(f"{key}: {model} cannot be downloaded ({first_line(error)}); try again.") from error
    name = weight_file(folder)
    if name is None:
        raise OmpError(
            f"{key}: {model} has no weights, neither {' nor '.join(WEIGHT_FILES)}, as a single file or in shards; "
            "name a model that has weights."
        )
    _check_shards(folder, name, key)


def has_complete_weights(folder: Path) -> bool:
    """Tell whether a folder has weights, and every shard exists and is as long as its header declares."""
    name = weight_file(folder)
    try:
        if name is not None:
            _check_shards(folder, name, "")
    except OmpError:
        return False
    return name is not None


def weight_file(folder: Path) -> str | None:
    """Return the name of the weight file that mergekit reads from a folder; None if there are no weights."""
    return next((n for n in WEIGHT_FILES if (folder / n).exists() or (folder / f"{n}.index.json").exists()), None)


def is_tokenizer_alone(model: ModelReference) -> bool:
    """Tell whether a model consists of a tokenizer without a configuration, hence without weights.

    Returns False if the hub is unreachable, so that reading the model reports the reason.
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
    except Exception:  # no such name, no network or no access
        return False
    return False


def _may_be_on_the_hub(path: str) -> bool:
    return bool(path) and path.count("/") <= 1 and path[0] not in "/~."


def _check_shards(folder: Path, name: str, key: str) -> None:
    index = folder / f"{name}.index.json"
    if not index.exists():
        _check_shard(folder / name, (), key)
        return
    for shard, tensors in _shards(index, key).items():
        lacking = _check_shard(folder / shard, tensors, key)
        if lacking is not None:
            raise OmpError(
                f"{key}: {index} says that {shard} holds {lacking}, which it does not; download the model again."
            )


def _shards(index: Path, key: str) -> dict[str, list[str]]:
    """Return the tensors of each shard that an index names, in alphabetical order."""
    shards: dict[str, list[str]] = {}
    with failures_as(
        lambda reason: f"{key}: {index} is not an index of weights ({reason}); download the model again."
    ):
        for tensor, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            shards.setdefault(shard, []).append(tensor)
    if not shards:
        raise OmpError(f"{key}: {index} names no tensors; download the model again.")
    for shard in sorted(shards, key=str):
        if not _is_inside(shard):
            raise OmpError(
                f"{key}: {index} names the shard {shard!r}, which is not a file in the model's folder; "
                "do not use this model unless you know why."
            )
    return dict(sorted(shards.items()))


def _is_inside(shard: Any) -> bool:
    """Tell whether a shard's name stays in the folder on every operating system."""
    if not isinstance(shard, str) or not 0 < len(shard) <= _LONGEST_NAME:
        return False
    windows = PureWindowsPath(shard)
    return not (PurePosixPath(shard).is_absolute() or windows.drive or windows.root or ".." in windows.parts)


def _check_shard(path: Path, tensors: Collection[str], key: str) -> str | None:
    """Raise an OmpError unless a shard can be read; return the first of the tensors that it lacks, if any."""
    if not path.is_file():
        raise OmpError(f"{key}: the shard {path} is missing; download the model again.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as shard:
                stored = set(shard.keys())
            return next((tensor for tensor in tensors if tensor not in stored), None)
        problem = _problem_of_pickle(path)
    except (SafetensorError, OSError) as error:
        problem = first_line(error)
    if problem:
        raise OmpError(f"{key}: {path} cannot be read ({problem}); download the model again.")
    return None


def _problem_of_pickle(path: Path) -> str | None:
    """Check a pickle without reading its numbers or executing its code; return the problem, or None."""
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        return "it contains more than tensors"
    except (RuntimeError, EOFError, ValueError):
        return "it is truncated"
    return None


def processor_files(model: ModelReference) -> list[Path]:
    """Return the files that describe a model's processor; [] for a text-only model."""
    found = (find_file(model, name) for name in PROCESSOR_FILES)
    return [path for path in found if path is not None]


def find_file(model: ModelReference, name: str) -> Path | None:
    """Return a file of a model, from its folder or the hub; None if it is missing or the hub is unreachable."""
    try:
        found = cached_file(model.model.path, name, revision=model.model.revision)
    except OSError:  # no such file, no such model, no access, no network
        return None
    return None if found is None else Path(found)


def read_settings(model: ModelReference, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a model; return {} if the file is missing or has other content."""
    found = find_file(model, name)
    try:
        settings = read_json(found) if found else {}
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_json(path: Path) -> Any:
    """Read a JSON file; return {} if it does not exist."""
    # Decoding bytes is faster than reading text, which looks for line ends.
    return json.loads(path.read_bytes().decode()) if path.exists() else {}


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Read a tokenizer.json without its vocabulary and merges, which take nearly all of the time and come last.

    Files whose parts have another order, or that are damaged before the vocabulary, are read completely.
    """
    head, _, _ = path.read_bytes().decode().partition('"vocab"')
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        declared = json.loads(head + '"vocab": {}}}')
        model = declared["model"]
        if declared.keys() >= _DECLARATIONS and (model["type"] != "BPE" or "continuing_subword_prefix" in model):
            return declared
    return read_json(path)
