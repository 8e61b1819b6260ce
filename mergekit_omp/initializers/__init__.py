"""Rows for new tokens by other means than OMP's combination of anchors alone; plain tensors, no mergekit."""

from mergekit_omp.initializers.regression import RowRegression, piece_rows, pieces_of_anchors

__all__ = ["RowRegression", "piece_rows", "pieces_of_anchors"]
