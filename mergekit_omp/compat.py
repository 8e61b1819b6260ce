"""Every name of mergekit that is not public API, with what is expected of it; imported from here and nowhere else.

mergekit 0.1.5 names no public API. Taken for public here: ``mergekit.common``, ``config``, ``graph``, ``options``,
``merge_methods``, ``architecture``, ``io.tasks``, ``io.lazy_tensor_loader`` and ``tokenizer.config``, which recipes,
merge methods and its documentation speak of. What is below may be gone in the next release; then a recipe of ours gets
the sentence of :func:`require_supported`, and other recipes run as ever.
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
    # `mergekit-yaml --chat-template`: names of files in this folder, `<name>.jinja`.
    from mergekit._data import chat_templates

    # The names and the axes of a checkpoint's tensors, inferred by means of transformers.
    from mergekit.architecture.auto import get_transformers_info, infer_architecture_info

    # Whether `LoadTensor` makes a tensor of this name from others that a checkpoint has.
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    # One tensor's merge; `gather_tensors` is what gives it its inputs, `input_parameters` are bound already.
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    # mergekit-tokensurgeon's functions, for the approximations that are its own.
    from mergekit.scripts.tokensurgeon import (
        ApproximationMethod,
        TokenSurgeonOptions,
        compute_new_embeddings,
        john_hewitt_init,
    )

    # `run_merge` takes the tokenizer that it saves from the `TokenizerInfo` that some task returned; a
    # `PermutedVocabulary` is what gives a merge its vocabulary tensors.
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
    # Wrapped by `plugin.patches`.
    "mergekit.config": ("MergeConfiguration.model_validate",),
    "mergekit.merge": (
        "run_merge",
        "get_architecture_info",
        "_model_out_config",
        "_set_chat_template",
        "generate_card",
    ),
    "mergekit.card": ("is_hf",),
    "mergekit.plan": (
        "MergePlanner._plan",
        "MergePlanner.plan_to_disk",
        "MergePlanner.plan_tensor",
        "MergePlanner.normalize_config",
    ),
    "mergekit.merge_methods": ("register", "registered_methods"),
    # Read by `open_loaders`.
    "mergekit.io.tasks": ("LoaderCache.loaders",),
}
"""Attributes that are used by name: what :func:`require_supported` looks for, beside the imports above."""


def require_supported() -> None:
    """Raise an OmpError unless the installed mergekit has everything that this package uses of it."""
    if _PROBLEM is None and all(
        _has(import_module(name), path) for name, paths in _EXPECTED.items() for path in paths
    ):
        return
    wanted = supported_range()
    raise OmpError(
        f"merge_method: omp works with mergekit{wanted}, but mergekit {metadata.version('mergekit')} is installed; "
        f"run `pip install 'mergekit{wanted}'`."
    ) from _PROBLEM


def supported_range() -> str:
    """The versions of mergekit that this package declares to work with, such as ``>=0.1.5,<0.2``."""
    requirements = map(Requirement, metadata.requires("mergekit-omp") or ())
    [versions] = [requirement.specifier for requirement in requirements if requirement.name == "mergekit"]
    return ",".join(sorted(map(str, versions), reverse=True))


def open_loaders() -> "dict[Any, LazyTensorLoader]":
    """The loaders of checkpoints that mergekit has opened in this process, by model; adding one is allowed."""
    from mergekit.io.tasks import LoaderCache

    return LoaderCache().loaders


def chat_template_names() -> list[str]:
    """The names that ``chat_template:`` can have in a recipe, beside ``auto``."""
    from importlib.resources import files

    names = (path.name for path in files(chat_templates).iterdir())
    return sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja"))


def chat_template_of(config: "MergeConfiguration") -> str | None:
    """The text of the chat template that a recipe asks for; None where the tokenizer keeps its own."""
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
