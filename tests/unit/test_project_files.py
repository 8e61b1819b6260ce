"""The files around the package agree with each other."""

import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mergekit_omp

PROJECT = Path(__file__).parents[2]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_requirement_has_a_pin_that_it_allows() -> None:
    """constraints.txt is the one list of versions, for all extras."""
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if not line.startswith("#"))
    }
    extras = PYPROJECT["optional-dependencies"].values()
    for text in [*PYPROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mergekit_omp.__version__ == metadata.version("mergekit-omp")
    assert citation["license"] == PYPROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PYPROJECT["authors"]]


def test_the_changelog_has_this_version() -> None:
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{mergekit_omp.__version__}]" in text or f"everything below is {mergekit_omp.__version__}" in text


@pytest.mark.parametrize("name", ["docs", "matrix", "release", "slow", "tests"])
def test_workflows_may_only_read_unless_a_job_says_more(name: str) -> None:
    workflow = yaml.safe_load((PROJECT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    writing = {job for job, steps in workflow["jobs"].items() if "write" in steps.get("permissions", {}).values()}
    assert writing == ({"publish"} if name in ("docs", "release") else set())
