"""No module imports itself by way of others."""

from graphlib import TopologicalSorter

import grimp


def test_no_import_cycle() -> None:
    """Imports within functions, and for type checkers alone, count; graphlib names the modules of a cycle.

    The contract in pyproject.toml is about neighbours, and does not see a module that imports from its own package.
    """
    graph = grimp.build_graph("mergekit_omp")
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imported) > 50
    TopologicalSorter(imported).prepare()
