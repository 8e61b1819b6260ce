"""Tables and text for standard output: coloured in a terminal, plain in a pipe, never wrapped or cut."""

import shlex
import sys
from collections.abc import Iterator, Sequence

import click
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Part = str | Text | Table | Padding
"""What can be printed. Text in it is taken literally, so that a token such as ``[red]`` is shown as it is."""


def new_table(*columns: str, align: str = "", header: bool = True, markdown: bool = False) -> Table:
    """Make an empty table.

    Args:
        columns: the names of the columns.
        align: ``l`` or ``r`` for each column; by default the first is left-aligned and the others, numbers, are right.
        header: show the names.
        markdown: draw it as a Markdown table, which can be pasted into an issue.
    """
    table = Table(box=box.MARKDOWN if markdown else None, show_header=header, pad_edge=markdown)
    for name, side in zip(columns, align or "l" + "r" * (len(columns) - 1), strict=True):
        table.add_column(name, justify="left" if side == "l" else "right")
    return table


def indented(table: Table, level: int = 2) -> Padding:
    """Move a table to the right, under its heading."""
    return Padding.indent(table, level)


def heading(text: str) -> Text:
    """Make a line that names what follows it."""
    return Text(text, style="bold")


def note(sentence: str) -> Text:
    """Make a line with a warning."""
    return Text.assemble(("Note: ", "bold yellow"), sentence)


def next_steps(commands: Sequence[tuple[Sequence[str], str]]) -> Iterator[Part]:
    """Yield a heading, and commands to run next, as for a shell.

    Args:
        commands: the words of each, and what it is for.
    """
    yield heading("Next")
    table = new_table("", "", align="ll", header=False)
    for words, purpose in commands:
        table.add_row(Text(shlex.join(words), style="cyan"), Text(f"# {purpose}", style="dim"))
    yield indented(table)


def render(*parts: Part, colours: bool = False) -> str:
    """Render parts below each other; lines are as long as their content.

    Args:
        parts: an empty string is an empty line.
        colours: add the escape sequences of a terminal, unless ``NO_COLOR`` is set.
    """
    console = Console(force_terminal=colours, width=sys.maxsize, markup=False, emoji=False, highlight=False)
    return "\n".join(_render(part, console) for part in parts)


def show(*parts: Part) -> None:
    """Print parts below each other, with colours where standard output is a terminal."""
    click.echo(render(*parts, colours=sys.stdout.isatty()))


def _render(part: Part, console: Console) -> str:
    with console.capture() as capture:
        console.print(part)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    text = "\n".join(lines).strip("\n")  # rich draws an empty line above and below a Markdown table
    return text.encode(errors="backslashreplace").decode()
