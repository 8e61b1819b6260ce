"""Run the examples in docstrings, each as a user would paste it: without names that it does not import itself."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import mergekit_omp
from mergekit_omp.evaluation.bits_per_byte import builtin_texts
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.report.scores import evaluate

PACKAGE = Path(mergekit_omp.__file__).parent
MODULES = sorted(
    ".".join(("mergekit_omp", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
DOCUMENTED = [
    *(getattr(mergekit_omp, name) for name in mergekit_omp.__all__ if name != "__version__"),
    builtin_texts,
    evaluate,
    OmpParameters,
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_are_correct(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    examples = [test for test in doctest.DocTestFinder().find(import_module(module), globs={}) if test.examples]
    assert examples
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.failures == 0, capsys.readouterr().out


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__name__)
def test_public_names_have_an_example(documented: object) -> None:
    [test] = doctest.DocTestFinder(recurse=False).find(documented, documented.__name__)
    assert test.examples
