"""Training-free tokenizer transplantation by Orthogonal Matching Pursuit, as mergekit merge methods."""

__version__ = "0.1.0"


def register() -> None:
    """Make ``omp`` and ``omp_<method>`` known to mergekit."""
