"""Training-free tokenizer transplantation by Orthogonal Matching Pursuit, as mergekit merge methods.

Only the names in ``__all__`` are public; other modules may change with any version. They are imported on first use:
``import torch`` imports this package, and must stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_omp.errors import OmpError
    from mergekit_omp.plugin.autoload import register
    from mergekit_omp.solver import SparseCodes, solve_omp
    from mergekit_omp.vocabulary.matching import match_vocabularies
    from mergekit_omp.vocabulary.tokens import read_vocabulary

__version__ = "0.1.0"

__all__ = [
    "OmpError",
    "SparseCodes",
    "__version__",
    "match_vocabularies",
    "read_vocabulary",
    "register",
    "solve_omp",
]

_HOMES = {
    "OmpError": "mergekit_omp.errors",
    "SparseCodes": "mergekit_omp.solver",
    "match_vocabularies": "mergekit_omp.vocabulary.matching",
    "read_vocabulary": "mergekit_omp.vocabulary.tokens",
    "register": "mergekit_omp.plugin.autoload",
    "solve_omp": "mergekit_omp.solver",
}

if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> object:
        """Import a public name (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
