"""Test that there are no import cycles between modules."""

from graphlib import TopologicalSorter

import grimp


def test_no_import_cycle() -> None:
    """Check imports, including those within functions and for type checkers; graphlib names the modules of a cycle.

    The contract in pyproject.toml compares sibling modules, and ignores imports of a module from its own package.
    """
    graph = grimp.build_graph("mergekit_omp")
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imported) > 50
    TopologicalSorter(imported).prepare()
