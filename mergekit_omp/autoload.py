"""The ``torch.backends`` entry point, through which mergekit finds this package.

PyTorch calls the entry points of that group at the end of ``import torch``, and every mergekit command imports torch
first. An exception here would break ``import torch`` for the whole environment, and an import would slow it down, so all
that happens is that hooks are left for the modules of mergekit that may be imported later.
"""

import logging


def on_torch_import() -> None:
    """Leave the import hooks; never raises, and imports nothing heavy."""
    try:
        from mergekit_omp import register

        register()
    except Exception as error:  # whatever is broken in this package, torch must import
        logging.getLogger(__name__).warning("mergekit-omp is installed but could not be set up: %r", error)
