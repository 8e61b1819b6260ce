"""Call a function once a module is completely imported, however far its import is now."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

Hook = Callable[[ModuleType], None]


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

    class AwaitingHook(type(module)):  # type: ignore[misc]  # the base is known at run time only
        def __getattribute__(self, attribute: str) -> object:
            read = super().__getattribute__
            if attribute != "__spec__" and not _is_initializing(read("__spec__")):
                self.__class__ = original  # type: ignore[assignment]
                hook(self)
                return getattr(self, attribute)
            return read(attribute)

    original = type(module)
    module.__class__ = AwaitingHook
