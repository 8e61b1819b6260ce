"""Training-free tokenizer transplantation by Orthogonal Matching Pursuit, as mergekit merge methods."""

from mergekit_omp.plugin.autoload import register

__version__ = "0.1.0"

__all__ = ["register"]
