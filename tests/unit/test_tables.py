"""Test tables and text for terminals and pipes."""

import sys

import pytest
from rich.cells import cell_len

from mergekit_omp.report.tables import Part, heading, indented, new_table, note, render, show


def parts() -> list[Part]:
    table = new_table("token", "uses")
    table.add_row("[red]모델 :smile:", "7")
    table.add_row("x" * 500, "12,345")
    return [heading("A heading"), "", table, note("a sentence " * 40)]


def test_nothing_is_cut_wrapped_or_interpreted() -> None:
    lines = render(*parts()).splitlines()
    assert lines[:2] == ["A heading", ""]
    assert lines[3].split() == ["[red]모델", ":smile:", "7"]
    assert lines[4] == f"{'x' * 500}  12,345"
    assert {cell_len(line) for line in lines[2:5]} == {508}, "aligned by the width of characters"
    assert lines[5] == f"Note: {'a sentence ' * 40}".rstrip()
    assert len(lines) == 6


def test_a_markdown_table_can_be_pasted() -> None:
    table = new_table("a", "b", markdown=True)
    table.add_row("x", "10")
    assert render(table) == "| a |  b |\n|---|----|\n| x | 10 |"
    assert render(indented(table)) == "  | a |  b |\n  |---|----|\n  | x | 10 |"


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    """Check that click and rich keep escape sequences for terminals only, and rich only if TERM is not dumb."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show(*parts())
    assert ("\x1b[" in capsys.readouterr().out) is terminal


def test_surrogates_are_escaped() -> None:
    """Check that a path with invalid UTF-8 does not end a command."""
    assert render("a\udcff") == "a\\udcff"
