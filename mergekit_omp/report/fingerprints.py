"""SHA-256 sums of what a transplant wrote, so that a folder can be compared with its record."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader

from mergekit_omp.errors import OmpError, failures_as

_WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
_NOT_COMPARED = ("omp_record.json", "omp_report.html", "README.md")
"""The record itself, what is made from it, and the model card, which its owner goes on to write."""


def fingerprints(folder: Path, tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """SHA-256 sums of a model's small files and of some of its tensors.

    Args:
        folder: the model's. Its weights, its record and its model card are left out of the files.
        tensors: names; those that the checkpoint does not store, because they are tied to others, are left out.

    Returns:
        "files" and "tensors", each from names to hexadecimal digits.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_compared(path.name))
    loader = LazyTensorLoader.from_disk(str(folder))
    stored = [name for name in dict.fromkeys(tensors) if name in loader.index.tensor_paths]
    return {
        "files": {path.name: file_sha256(path) for path in files},
        "tensors": {name: tensor_sha256(loader.get_tensor(name)) for name in stored},
    }


def changes(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Find what differs between a folder and its record: name -> "changed" or "missing".

    Raises:
        OmpError: the record has no sums, or the weights cannot be read.
    """
    if "sha256" not in record:
        raise OmpError(f"The record of {folder} has no SHA-256 sums; make the model again.")
    expected = record["sha256"]
    # Arbitrary errors of mergekit and of safetensors, for an index and for shards.
    with failures_as(lambda reason: f"{folder}: its weights cannot be read ({reason}); copy the model again."):
        found = fingerprints(folder, expected["tensors"])
    return {
        name: "changed" if name in found[part] else "missing"
        for part, sums in expected.items()
        for name, sum_ in sums.items()
        if found[part].get(name) != sum_
    }


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data.cast("B"))
    return digest.hexdigest()


def _is_compared(name: str) -> bool:
    return not name.endswith(_WEIGHTS) and name not in _NOT_COMPARED
