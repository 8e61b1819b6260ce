"""How mergekit comes to know this package: import hooks, left when torch is imported.

mergekit discovers no plugins. PyTorch does: it calls the entry points of the group ``torch.backends`` at the end of
``import torch``, and every mergekit command imports torch first. What is called there only leaves hooks for modules of
mergekit that may be imported later; mergekit itself is never imported from here, and nothing heavy is.
"""

import logging
from types import ModuleType

from mergekit_omp.plugin.import_hooks import Hook, when_imported

_registered = False


def on_torch_import() -> None:
    """Leave the hooks; the ``torch.backends`` entry point. Never raises: that would break ``import torch``."""
    try:
        register()
    except Exception as error:
        logging.getLogger(__name__).warning("mergekit-omp is installed but could not be set up: %r", error)


def register() -> None:
    """Make ``omp`` and ``omp_<method>`` known to mergekit, now or as soon as it is imported.

    Only needed where the entry point does not run (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, or torch imported before this
    package was installed). Calling it twice is harmless.

    Example:
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
        # A failure here must not break mergekit's own recipes; ours then say what is wrong (compat.require_supported).
        try:
            from mergekit_omp.plugin import patches

            getattr(patches, function)(module)
        except Exception as error:
            logging.getLogger(__name__).warning("mergekit-omp could not connect to %s: %r", module.__name__, error)

    return hook
