"""The command ``mergekit-omp``: one module a subcommand, and ``options`` for what they share.

Modules import click, and ``heal`` pydantic, when they are imported, so that ``--help`` is fast; a command imports the
rest when it runs.
"""
