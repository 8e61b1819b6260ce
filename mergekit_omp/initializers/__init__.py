"""Where the rows of new tokens come from: one file for each initializer, or family of them.

An initializer is a function from :class:`~mergekit_omp.initializers.base.NewTokens` to a
:data:`~mergekit_omp.initializers.base.RowFunction`.
"""
