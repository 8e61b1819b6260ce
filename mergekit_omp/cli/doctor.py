"""``mergekit-omp doctor``: whether everything between this package and mergekit is in place."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import click

from mergekit_omp.cli.options import JSON, print_json, working
from mergekit_omp.errors import OmpError

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        ok: whether nothing has to be done.
        text: what was found, and what to do where that is a problem.
    """

    ok: bool
    text: str


@click.command(short_help="Check the installation: merge methods, versions, devices, cache.")
@JSON
def doctor(as_json: bool) -> None:
    """Check that mergekit knows the merge methods, and list versions, devices and the cache.

    The exit status is 1 if there is a problem.
    """
    from rich.text import Text

    from mergekit_omp.report.tables import new_table, show

    with working("Checking"):
        checks = diagnose()
    if as_json:
        print_json([{"ok": check.ok, "text": check.text} for check in checks])
    else:
        table = new_table("", "", align="ll", header=False)
        for check in checks:
            status = Text("ok", style="green") if check.ok else Text("PROBLEM", style="bold red")
            table.add_row(status, check.text)
        show(table)
    if not all(check.ok for check in checks):
        raise SystemExit(1)


def diagnose() -> list[Check]:
    """Run all checks."""
    return [*_discovery(), *_methods(), *_versions(), *_devices(), *_cache()]


def _discovery() -> Iterator[Check]:
    entries = [entry for entry in metadata.entry_points(group="torch.backends") if entry.name == "mergekit_omp"]
    if entries:
        yield Check(True, "torch loads the plugin when it is imported, and so does every mergekit command")
    else:
        yield Check(
            False, "torch does not find the plugin; reinstall it: `pip install --force-reinstall mergekit-omp`"
        )
    if os.environ.get(AUTOLOAD) == "0":
        yield Check(
            False,
            f"{AUTOLOAD}=0 keeps torch from loading the plugin; unset it, or call `mergekit_omp.register()` before a "
            "merge",
        )


def _methods() -> Iterator[Check]:
    from mergekit_omp.plugin.autoload import register

    register()
    try:
        from mergekit import merge_methods

        from mergekit_omp.compat import require_supported
        from mergekit_omp.parameters import is_ours
        from mergekit_omp.plugin.patches import is_connected

        require_supported()
    except (OmpError, ImportError) as error:
        yield Check(False, str(error))
        return
    names = sorted(method.spec.name for method in merge_methods.registered_methods() if is_ours(method.spec.name))
    yield Check(bool(names), f"mergekit knows {len(names)} merge methods of the plugin: {', '.join(names)}")
    connected = is_connected()
    yield Check(
        connected,
        "mergekit's run_merge is wrapped: recipes are checked first, and outputs appear when they are complete"
        if connected
        else "mergekit's run_merge is not wrapped; call `mergekit_omp.register()` before mergekit is imported",
    )


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
        yield Check(True, f"{device}: {name}, {free_memory(device) / 1e9:.1f} GB of free memory")


def _cache() -> Iterator[Check]:
    from mergekit_omp.solver.cache import FOLDER_VARIABLE, cache_folder, cache_limit, cache_size

    folder = cache_folder()
    if folder is None:
        yield Check(True, f"the cache of sparse codes is off: {FOLDER_VARIABLE}={os.environ[FOLDER_VARIABLE]}")
        return
    try:
        limit = cache_limit()
    except OmpError as error:
        yield Check(False, str(error))
        return
    yield Check(
        True, f"sparse codes are cached in {folder}: {cache_size(folder) / 1e6:.0f} of {limit / 1e6:.0f} MB are used"
    )
