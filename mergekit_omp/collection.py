"""Spare Python's garbage collector the objects of a run: millions, of which hardly any is garbage in a cycle.

Objects are freed as soon as nothing refers to them, with or without the collector, which looks for cycles alone. Its
searches of all objects took a tenth of a run.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause collection while many objects are made, and leave these out of later collections of the run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Leave all objects that there are out of collections while a run lasts, and all objects as the process ends.

    At its end an interpreter collects all modules' objects, whose memory the system gets back anyway.
    """
    atexit.register(gc.freeze)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
