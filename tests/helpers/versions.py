"""Marks for tests of behaviour that only some versions of transformers have."""

import pytest
import transformers
from packaging.version import Version

TRANSFORMERS = Version(transformers.__version__)


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip a test before the first version of transformers that does what it is about."""
    return pytest.mark.skipif(Version(version) > TRANSFORMERS, reason=f"{what} begins with transformers {version}")
