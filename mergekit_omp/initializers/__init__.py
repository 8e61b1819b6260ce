"""Make the rows of new tokens: one module per initializer or family of initializers.

An initializer is a function from :class:`~mergekit_omp.initializers.base.NewTokens` to a
:data:`~mergekit_omp.initializers.base.RowFunction`.
"""
