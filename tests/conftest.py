"""Define fixtures for several test files, and mark tests that need the network."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["MERGEKIT_OMP_CACHE"] = "off"  # codes of an earlier run must not hide what the solver does now
# Each of pytest-xdist's workers has a thread for each core. A thread that waits must not keep a core from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


REAL_WEIGHTS = {"smollm2_dir", "gemma3_dir"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use real weights from the package index, and leave long tests out of coverage.

    Quick tests run the same lines, and tracing them costs the more the longer a test is.
    """
    for item in items:
        if REAL_WEIGHTS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.network)
        if item.get_closest_marker("network") or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.no_cover)


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, set[str]], str]:
    """Move a checkpoint to a hub cache without the shards that are not needed; nothing else is reachable.

    Only processes that a test starts read this cache. It returns the name there; the revision is 40 zeros.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def move(folder: Path, needed: set[str]) -> str:
        repository = tmp_path / "hub" / f"models--some--{folder.name}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.parent.mkdir(parents=True)
        folder.rename(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0" * 40)
        index = snapshot / "model.safetensors.index.json"
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            keep = {weight_map[name] for name in needed}
            others = [path for path in snapshot.glob("*.safetensors") if path.name not in keep]
            assert len(others) > 2
            for path in others:
                path.unlink()
        return f"some/{folder.name}"

    return move
