"""Register import hooks for mergekit when torch is imported.

mergekit has no plugin discovery. PyTorch has: it calls the entry points of the group ``torch.backends`` at the end of
``import torch``, and every mergekit command imports torch first. The entry point waits for the import of mergekit, and
registers hooks for its modules then. It imports no other package: ``import torch`` costs two milliseconds more
(``python -m benchmarks.import_time``).
"""

import logging
import sys
from types import ModuleType

from mergekit_omp.plugin.import_hooks import Hook, before_import, when_imported

_registered = False


def on_torch_import() -> None:
    """Register once mergekit is imported; the entry point of ``torch.backends``.

    Never raises, which would break ``import torch``.
    """
    if "mergekit" in sys.modules:  # it imports torch
        _register_or_warn()
    else:
        before_import("mergekit", _register_or_warn)


def _register_or_warn() -> None:
    try:
        register()
    except Exception as error:
        logging.getLogger(__name__).warning("mergekit-omp is installed but failed to register: %r", error)


def register() -> None:
    """Register ``omp`` and ``omp_<method>`` with mergekit, now or as soon as it is imported.

    Only needed if the entry point does not run (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, or torch was imported before this
    package was installed). Repeated calls have no effect.

    Example:
        >>> from mergekit_omp import register
        >>> register()
        >>> from mergekit import merge_methods
        >>> merge_methods.get("omp_slerp").spec.name
        'omp_slerp'
    """
    global _registered
    if _registered:
        return
    for module, function in (
        ("mergekit.config", "connect_config"),
        ("mergekit.merge_methods", "connect_methods"),
        ("mergekit.plan", "connect_planner"),
        ("mergekit.merge", "connect_run"),
        ("mergekit.card", "connect_card"),
    ):
        when_imported(module, _call_patch(function))
    _registered = True


def _call_patch(function: str) -> Hook:
    def hook(module: ModuleType) -> None:
        # A failure must not break mergekit's own recipes; compat.require_supported reports it for recipes of this
        # package.
        try:
            from mergekit_omp.plugin import patches

            getattr(patches, function)(module)
        except Exception as error:
            logging.getLogger(__name__).warning("mergekit-omp failed to connect to %s: %r", module.__name__, error)

    return hook
