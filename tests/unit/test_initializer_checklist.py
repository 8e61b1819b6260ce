"""What CONTRIBUTING.md asks of an initializer, for every one that is registered."""

import re
from pathlib import Path

import pytest
import yaml

from mergekit_omp.initializers.registry import INITIALIZERS, needs_donor
from mergekit_omp.parameters import Approximation, OmpParameters
from mergekit_omp.report.comparison import parse_approximations

PROJECT = Path(__file__).parents[2]
NAMES = [approximation.value for approximation in Approximation]
CHECKLIST = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add an initializer")[2]
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "tests/recipes").glob("test_*.py"))


def example(name: str) -> Path:
    """The recipe that shows an initializer; OMP is the default of any."""
    return PROJECT / "examples/yaml" / ("transplant.yml" if name == "omp" else f"approximation_{name}.yml")


def table_row(name: str) -> list[str]:
    """The cells of an initializer in the table of docs/methods.md."""
    lines = (PROJECT / "docs/methods.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    found = [row for row in rows if f"`{name}`" in row[0]]
    assert found, f"docs/methods.md has no row of `{name}`"
    return found[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_registered_and_can_be_compared(name: str) -> None:
    assert Approximation(name) in INITIALIZERS
    assert parse_approximations(name) == [Approximation(name)]


@pytest.mark.parametrize("name", NAMES)
def test_it_has_an_example(name: str) -> None:
    """tests/recipes/test_pipelines.py runs every recipe of this folder."""
    text = example(name).read_text(encoding="utf-8")
    assert yaml.safe_load(text)["parameters"].get("approximation", "omp") == name
    assert re.match(r"# \S.+", text), "begins with a comment that says what it does"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name: str) -> None:
    """Its row says what it does, and truly whether it needs the donor's weights."""
    _, what, weights, *_ = table_row(name)
    assert what
    assert weights == ("yes" if needs_donor(OmpParameters(approximation=Approximation(name))) else "no")


@pytest.mark.parametrize("name", NAMES)
def test_tests_name_it(name: str) -> None:
    """A test of recipes has it in a parametrization."""
    assert re.search(rf'"{name}"', TESTS)


@pytest.mark.parametrize("name", NAMES)
def test_its_function_says_what_it_computes(name: str) -> None:
    initializer = INITIALIZERS[Approximation(name)]
    assert (initializer.prepare.__doc__ or "").strip()


def test_parameters_of_one_initializer_name_it() -> None:
    for parameter, field in OmpParameters.model_fields.items():
        for names in re.findall(r"For ((?:`\w+`(?:,| and)? ?)+)", field.description or ""):
            unknown = set(re.findall(r"`(\w+)`", names)) - set(NAMES)
            assert not unknown, f"{parameter} is for {unknown}"


def test_needed_parameters_are_in_the_examples() -> None:
    """A parameter that is for some initializers is set in an example of one of them, or has a default that serves."""
    for parameter, field in OmpParameters.model_fields.items():
        named = re.findall(r"`(\w+)`", (field.description or "").partition(":")[0])
        if not (field.description or "").startswith("For ") or field.default is not None:
            continue
        texts = [example(name).read_text(encoding="utf-8") for name in named]
        assert any(re.search(rf"\b{parameter}:", text) for text in texts), parameter


def test_the_checklist_names_the_files() -> None:
    """The steps of CONTRIBUTING.md lead to files that are there."""
    paths = re.findall(r"`((?:mergekit_omp|docs|examples|tests)/[\w./]+\.(?:py|md))`", CHECKLIST)
    assert len(paths) >= 5
    assert [path for path in paths if not (PROJECT / path).exists()] == []
