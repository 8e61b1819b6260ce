"""Handle models that declare a tied LM head but store a separate one."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache

from mergekit_omp.checkpoints.architecture import VocabularyRole, is_tied, vocabulary_role

_TIED = "tie_word_embeddings"


def tied_parts(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the configuration and its nested parts that declare a tied head."""
    if settings.get(_TIED) is True:
        yield settings
    for value in settings.values():
        if isinstance(value, dict):
            yield from tied_parts(value)


def untie_where_head_differs(folder: Path, weights: Iterable[WeightInfo], settings: dict[str, Any]) -> None:
    """Declare a written model untied, in place, if its head differs from its embedding.

    Engines that rely on ``tie_word_embeddings`` ignore a separate head.

    Args:
        folder: the output folder, with all tensors.
        weights: tensors of its architecture.
        settings: content of its config.json.
    """
    loader = LazyTensorLoader(ShardedTensorIndex.from_disk(str(folder)), lazy_unpickle=True)
    inputs, heads = _stored_pair(weights, loader)
    if inputs and heads and not any(_are_equal(loader, name, heads[0]) for name in inputs):
        for part in tied_parts(settings):
            part[_TIED] = False


def is_redundant_head(
    weight: WeightInfo, weights: Iterable[WeightInfo], models: Iterable[ModelReference], trust_remote_code: bool
) -> bool:
    """Tell whether a weight is the head of models that all tie it, so that it need not be written.

    Args:
        weight: one of the tensors that a merge would write.
        weights: all of these tensors.
        models: the models that are merged; their checkpoints are read if they store a head.
        trust_remote_code: whether to run code that comes with a model to read its configuration.
    """
    if not weight.optional or not _is_vocabulary_matrix(weight, VocabularyRole.HEAD):
        return False
    for model in models:
        if not is_tied(model.config(trust_remote_code=trust_remote_code)):
            return False
        loader = LoaderCache().get(model)
        inputs, heads = _stored_pair(weights, loader)
        if heads and not any(_are_equal(loader, name, heads[0]) for name in inputs):
            return False
    return True


def _stored_pair(weights: Iterable[WeightInfo], loader: LazyTensorLoader) -> tuple[list[str], list[str]]:
    """Return the names under which a checkpoint stores its input embeddings and its head."""

    def stored(role: VocabularyRole) -> list[str]:
        names = [(w.name, *(w.aliases or ())) for w in weights if _is_vocabulary_matrix(w, role)]
        return [name for aliases in names for name in aliases if name in loader.index.tensor_paths]

    weights = list(weights)
    return stored(VocabularyRole.INPUT), stored(VocabularyRole.HEAD)


def _is_vocabulary_matrix(weight: WeightInfo, role: VocabularyRole) -> bool:
    return (
        weight.vocabulary_axis is not None and weight.name.endswith(".weight") and vocabulary_role(weight.name) is role
    )


def _are_equal(loader: LazyTensorLoader, one: str, other: str) -> bool:
    return torch.equal(loader.get_tensor(one), loader.get_tensor(other))
