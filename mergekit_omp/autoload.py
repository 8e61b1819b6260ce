"""How mergekit comes to know this package: import hooks, left when torch is imported.

mergekit discovers no plugins. PyTorch does: it calls the entry points of the group ``torch.backends`` at the end of
``import torch``, and every mergekit command imports torch first. What is called there only leaves hooks for modules of
mergekit that may be imported later; mergekit itself is never imported from here, and nothing heavy is.
"""

import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

Hook = Callable[[ModuleType], None]

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
    """
    global _registered
    if _registered:
        return
    for module, hook in (
        ("mergekit.config", "connect_config"),
        ("mergekit.merge_methods", "connect_methods"),
        ("mergekit.plan", "connect_planner"),
        ("mergekit.merge", "connect_run"),
    ):
        when_imported(module, _call_plugin(hook))
    _registered = True


def _call_plugin(function: str) -> Hook:
    def hook(module: ModuleType) -> None:
        # A failure here must not break mergekit's own recipes; ours then say what is wrong (plugin.require_supported).
        try:
            from mergekit_omp import plugin

            getattr(plugin, function)(module)
        except Exception as error:
            logging.getLogger(__name__).warning("mergekit-omp could not connect to %s: %r", module.__name__, error)

    return hook


def when_imported(name: str, hook: Hook) -> None:
    """Call ``hook`` with the module ``name`` once it is completely imported."""
    import wrapt

    module = sys.modules.get(name)
    if module is None:
        wrapt.register_post_import_hook(hook, name)
    elif not _is_initializing(module.__spec__):
        hook(module)
    else:
        _on_first_use(module, hook)


def _is_initializing(spec: ModuleSpec | None) -> bool:
    return getattr(spec, "_initializing", False)


def _on_first_use(module: ModuleType, hook: Hook) -> None:
    """Call ``hook`` at the first attribute that is read from ``module`` after its import has finished.

    ``from mergekit.merge import run_merge`` may itself be what imports torch, and so us: the module is then half
    initialised, too late for an import hook and too early to wrap anything. As in ``importlib.util.LazyLoader``, the
    module's class is changed until then.
    """

    class AwaitingHook(type(module)):
        def __getattribute__(self, attribute: str) -> object:
            read = super().__getattribute__
            if attribute != "__spec__" and not _is_initializing(read("__spec__")):
                self.__class__ = original
                hook(self)
                return getattr(self, attribute)
            return read(attribute)

    original = type(module)
    module.__class__ = AwaitingHook
