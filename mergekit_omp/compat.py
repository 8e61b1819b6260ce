"""Import every private name of mergekit that this package uses, in this module only.

mergekit 0.1.5 declares no public API. These modules are treated as public, since recipes, merge methods and the
documentation refer to them: ``mergekit.common``, ``config``, ``graph``, ``options``, ``merge_methods``,
``architecture``, ``io.tasks``, ``io.lazy_tensor_loader`` and ``tokenizer.config``. A later release may lack the names
below; then :func:`require_supported` rejects recipes of this package, and other recipes run unchanged.
"""

from importlib import import_module, metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from mergekit_omp.errors import OmpError

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader

try:
    # Folder of the files `<name>.jinja` that a recipe's `chat_template` can name.
    from mergekit._data import chat_templates

    # Names and axes of a checkpoint's tensors, inferred by transformers.
    from mergekit.architecture.auto import get_transformers_info, infer_architecture_info

    # Whether `LoadTensor` computes a tensor of this name from other tensors of a checkpoint.
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    # The merge of one tensor: `gather_tensors` provides its inputs, `input_parameters` are bound.
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    # Functions of mergekit-tokensurgeon, for its own approximations.
    from mergekit.scripts.tokensurgeon import (
        ApproximationMethod,
        TokenSurgeonOptions,
        compute_new_embeddings,
        john_hewitt_init,
    )

    # `run_merge` saves the tokenizer of the `TokenizerInfo` that a task returns; a `PermutedVocabulary` provides the
    # vocabulary tensors of a merge.
    from mergekit.tokenizer import PermutedVocabulary, TokenizerInfo
    from mergekit.tokensurgeon import SubwordMethod, WeightingScheme, batch_mp_rope, compute_token_basis
    from mergekit.tokensurgeon.magikarp import well_trained_tokens
except ImportError as error:
    _PROBLEM: ImportError | None = error
else:
    _PROBLEM = None

__all__ = [
    "ApproximationMethod",
    "ExecuteMergeMethodTask",
    "PermutedVocabulary",
    "SubwordMethod",
    "TokenSurgeonOptions",
    "TokenizerInfo",
    "WeightingScheme",
    "batch_mp_rope",
    "can_convert_checkpoint_keys",
    "chat_template_names",
    "chat_template_of",
    "compute_new_embeddings",
    "compute_token_basis",
    "get_transformers_info",
    "infer_architecture_info",
    "john_hewitt_init",
    "open_loaders",
    "require_supported",
    "supported_range",
    "well_trained_tokens",
]

_EXPECTED = {
    # Wrapped by `plugin.patches`, except for `_set_chat_template`, which `chat_template_of` calls.
    "mergekit.config": ("MergeConfiguration.model_validate", "MergeConfiguration.referenced_models"),
    "mergekit.merge": (
        "run_merge",
        "get_architecture_info",
        "_model_out_config",
        "_set_chat_template",
        "generate_card",
    ),
    "mergekit.card": ("is_hf",),
    "mergekit.plan": ("MergePlanner._plan", "MergePlanner.plan_to_disk"),
    # Called by `plugin.patches`.
    "mergekit.merge_methods": ("register", "registered_methods"),
    # Read by `open_loaders`.
    "mergekit.io.tasks": ("LoaderCache.loaders",),
}
"""Attributes that are used by name; :func:`require_supported` checks them in addition to the imports above."""


def require_supported() -> None:
    """Raise an OmpError unless the installed mergekit has all names that this package uses."""
    if _PROBLEM is None and all(
        _has(import_module(name), path) for name, paths in _EXPECTED.items() for path in paths
    ):
        return
    versions = supported_range()
    raise OmpError(
        f"merge_method: omp works with mergekit{versions}, but mergekit {metadata.version('mergekit')} is installed; "
        f"run `pip install 'mergekit{versions}'`."
    ) from _PROBLEM


def supported_range() -> str:
    """Return the range of supported versions of mergekit, such as ``>=0.1.5,<0.2``."""
    requirements = map(Requirement, metadata.requires("mergekit-omp") or ())
    [versions] = [requirement.specifier for requirement in requirements if requirement.name == "mergekit"]
    return ",".join(sorted(map(str, versions), reverse=True))


def open_loaders() -> "dict[Any, LazyTensorLoader]":
    """Return mergekit's cache of open checkpoint loaders by model, to read or extend."""
    from mergekit.io.tasks import LoaderCache

    return LoaderCache().loaders


def chat_template_names() -> list[str]:
    """Return the names that ``chat_template:`` accepts in a recipe, except ``auto``."""
    from importlib.resources import files

    names = (path.name for path in files(chat_templates).iterdir())
    return sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja"))


def chat_template_of(config: "MergeConfiguration") -> str | None:
    """Return the chat template that a recipe sets; None if the tokenizer keeps its own."""
    if not config.chat_template:
        return None
    from types import SimpleNamespace

    from mergekit.merge import _set_chat_template

    holder: Any = SimpleNamespace(chat_template=None)
    _set_chat_template(holder, config)
    return holder.chat_template


def _has(module: ModuleType, path: str) -> bool:
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True
