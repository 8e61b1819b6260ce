"""The one exception that a user's mistake raises."""

import click


class OmpError(click.ClickException, ValueError):
    """A mistake in a recipe or a model, told in one sentence.

    mergekit's commands are click commands, so raising this anywhere below one of them prints ``Error: <sentence>`` and
    exits with status 1, without a traceback. In a notebook it is an ordinary ``ValueError``.
    """
