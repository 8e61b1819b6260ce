"""Call a function before a module is imported, or as soon as it is, whatever the current state of its import."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

Hook = Callable[[ModuleType], None]


class _Watcher:
    """A finder of modules that finds none, and calls a function whenever a module is looked for."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self._name, self._call = name, call

    def find_spec(self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None) -> None:
        if name == self._name:
            self._call()


def before_import(name: str, call: Callable[[], None]) -> None:
    """Call a function, which may be called repeatedly, before the module ``name`` is imported."""
    sys.meta_path.insert(0, _Watcher(name, call))


def when_imported(name: str, hook: Hook) -> None:
    """Call ``hook`` with the module ``name`` as soon as it is completely imported."""
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
    """Call ``hook`` at the first attribute access of ``module`` after its import.

    ``from mergekit.merge import run_merge`` may import torch, and so this package. The module is then partially
    initialised: too late for an import hook, and too early to wrap its functions. As in
    ``importlib.util.LazyLoader``, the module's class is replaced until then.
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
