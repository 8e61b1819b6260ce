"""Where the rows of new tokens come from: one file for each method, or family of methods.

A method is a function from :class:`NewTokens` to a :data:`RowMaker`.
"""
