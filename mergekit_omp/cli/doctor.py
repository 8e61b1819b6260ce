"""Whether everything between this package and mergekit is in place; what ``mergekit-omp doctor`` prints."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from mergekit_omp.errors import OmpError
from mergekit_omp.plugin.autoload import register
from mergekit_omp.solver.cache import cache_folder, cache_limit, cache_size

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it is as it should be, and a line about it."""

    ok: bool
    text: str


def diagnose() -> list[Check]:
    """Everything worth telling, problems included."""
    return [*_discovery(), *_methods(), *_versions(), *_devices(), *_cache()]


def _discovery() -> Iterator[Check]:
    entries = [entry for entry in metadata.entry_points(group="torch.backends") if entry.name == "mergekit_omp"]
    if entries:
        yield Check(True, "torch finds the package when it is imported, and so does every mergekit command")
    else:
        yield Check(
            False, "torch does not find the package; reinstall it: `pip install --force-reinstall mergekit-omp`"
        )
    if os.environ.get(AUTOLOAD) == "0":
        yield Check(
            False,
            f"{AUTOLOAD}=0 keeps torch from loading it; unset that, or call `mergekit_omp.register()` before a merge",
        )


def _methods() -> Iterator[Check]:
    register()
    try:
        import mergekit.merge
        from mergekit import merge_methods

        from mergekit_omp.compat import require_supported
        from mergekit_omp.parameters import is_ours

        require_supported()
    except (OmpError, ImportError) as error:
        yield Check(False, str(error))
        return
    names = sorted(method.spec.name for method in merge_methods.registered_methods() if is_ours(method.spec.name))
    yield Check(bool(names), f"mergekit knows {len(names)} merge methods of this package: {', '.join(names)}")
    connected = hasattr(mergekit.merge.run_merge, "__wrapped__")
    yield Check(connected, "runs are checked first and published whole" if connected else "run_merge is not connected")


def _versions() -> Iterator[Check]:
    from mergekit_omp.report.record import versions

    yield Check(True, ", ".join(f"{name} {version}" for name, version in versions().items()))
    yield Check(True, platform.platform())


def _devices() -> Iterator[Check]:
    import torch

    from mergekit_omp.solver.memory import free_memory

    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in devices:
        name = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        yield Check(True, f"{device}: {name}, {free_memory(device) / 1e9:.1f} GB of memory free")


def _cache() -> Iterator[Check]:
    folder = cache_folder()
    if folder is None:
        yield Check(True, "codes are not kept: MERGEKIT_OMP_CACHE turns that off")
        return
    try:
        limit = cache_limit()
    except OmpError as error:
        yield Check(False, str(error))
        return
    yield Check(True, f"codes are kept in {folder}: {cache_size(folder) / 1e6:.0f} MB of at most {limit / 1e6:.0f} MB")
