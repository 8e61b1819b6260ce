"""Copy the code that comes with a model and that its configuration names."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from transformers.dynamic_module_utils import get_relative_imports

from mergekit_omp.checkpoints.files import find_file


def copy_code(settings: Mapping[str, Any], model: ModelReference, folder: Path) -> None:
    """Copy the modules of a model that ``auto_map`` in its settings names, with those that they import.

    Code in another repository, ``<owner>/<name>--<module>.<class>``, stays there. Files that are in ``folder`` stay.
    """
    values = (settings.get("auto_map") or {}).values()
    classes = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = {name.rpartition(".")[0] for name in classes if name and "--" not in name}
    while modules:
        path = find_file(model, f"{modules.pop()}.py")
        if path is not None and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
            modules.update(get_relative_imports(path))
