"""Marks for tests of behaviour that only some versions of transformers have."""

import pytest
import transformers
from packaging.version import Version

TRANSFORMERS = Version(transformers.__version__)


def has(version: str) -> bool:
    """Tell whether transformers is of this version or a newer one."""
    return Version(version) <= TRANSFORMERS


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip a test before the first version of transformers that does what it is about."""
    return pytest.mark.skipif(not has(version), reason=f"{what} begins with transformers {version}")
