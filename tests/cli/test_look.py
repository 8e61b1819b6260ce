"""Every command looks alike: tables and colours in a terminal, plain text in a pipe, and JSON where it reports."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, run_recipe, save
from helpers.commands import merge_here, recipe

from mergekit_omp.cli.main import main
from mergekit_omp.report.run_log import next_commands

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a recipe, its output, a text and a recipe that learns a token map from it."""
    path = tmp_path_factory.mktemp("look")
    base, donor = byte_level_tokenizer(ENGLISH, size=400), byte_level_tokenizer(PYTHON, size=360)
    save(path / "base", make_model(base, seed=1), base)
    save(path / "donor", make_model(donor, hidden=24), donor)
    asked = recipe(path / "base", path / "donor")
    (path / "recipe.yml").write_text(yaml.safe_dump(asked))
    (path / "text.txt").write_text("\n".join([*ENGLISH, *PYTHON]) * 3)
    learning = {"approximation": "tokalign", "corpus": str(path / "text.txt")}
    (path / "learning.yml").write_text(yaml.safe_dump({**asked, "parameters": learning}))
    assert merge_here(asked, path / "out", "--quiet").exit_code == 0
    return path


def arguments(command: str, folder: Path, scratch: Path) -> list[str]:
    """A call of a command that succeeds in a few seconds."""
    return {
        "align": ["align", f"{folder}/learning.yml", f"{scratch}/map.json"],
        "audit": ["audit", f"{folder}/out"],
        "compare": ["compare", f"{folder}/recipe.yml", "--approximations", "mean", "--text", f"{folder}/text.txt"],
        "doctor": ["doctor"],
        "eval": ["eval", f"{folder}/base", f"{folder}/out", "--text", f"{folder}/text.txt"],
        "heal": ["heal", f"{folder}/out", f"{scratch}/healed", "--text", f"{folder}/text.txt", "--tokens", "500"],
        "init": ["init", f"{folder}/base", f"{folder}/donor", "-o", f"{scratch}/recipe.yml"],
        "inspect": ["inspect", f"{folder}/recipe.yml"],
        "report": ["report", f"{folder}/out", "--html", f"{scratch}/page.html"],
        "restore": ["restore", f"{folder}/out", f"{scratch}/restored"],
        "tokens": ["tokens", f"{folder}/out", "--text", f"{folder}/text.txt"],
    }[command]


COMMANDS = ["align", "audit", "compare", "doctor", "eval", "heal", "init", "inspect", "report", "restore", "tokens"]


def test_every_command_reports_as_json() -> None:
    lacking = [name for name, command in main.commands.items() if "as_json" not in {p.name for p in command.params}]
    assert lacking == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_gets_plain_text_and_json(command: str, folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, arguments(command, folder, tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert ESCAPE.search(result.output) is None
    assert "\r" not in result.output, "no progress bar"
    (tmp_path / "json").mkdir()
    result = CliRunner().invoke(main, [*arguments(command, folder, tmp_path / "json"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)


def in_terminal(run: Callable[[int], subprocess.Popen[bytes]]) -> str:
    """What a process writes to a terminal of 100 columns, which ``run`` gets the number of."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = run(its)
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(ours, 2**16)
        except OSError:  # the process has closed its end
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def start(command: list[str], terminal: int) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    return subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_a_terminal_gets_colours_and_a_sign_of_life(folder: Path, tmp_path: Path) -> None:
    call = [program("mergekit-omp"), *arguments("report", folder, tmp_path)]
    written = in_terminal(lambda terminal: start(call, terminal))
    assert "\x1b[1mTokens per byte\x1b[0m" in written
    assert "Drawing the page …" in written
    last = ESCAPE.sub("", written).splitlines()[-1]
    assert last == f"Page with pictures: {tmp_path}/page.html"


def test_lines_of_a_run_stand_above_its_progress_bars(folder: Path, tmp_path: Path) -> None:
    call = [program("mergekit-yaml"), f"{folder}/recipe.yml", f"{tmp_path}/out"]
    written = in_terminal(lambda terminal: start(call, terminal))
    assert "Executing graph" in written
    assert "Approximating tokens" in written
    lines = [line for line in written.split("\n") if "mergekit-omp: " in line]
    assert len(lines) >= 7
    for line in lines:
        before = ESCAPE.sub("", line[: line.index("mergekit-omp: ")])
        assert before.rpartition("\r")[2].strip() == "", line
        assert not re.search(r"\d%\|", line[line.index("mergekit-omp: ") :]), line
    assert any("\x1b[33m\x1b[1mWarning: \x1b[0m" in line for line in lines)


def test_a_run_says_what_it_will_do_and_what_it_made(folder: Path, tmp_path: Path) -> None:
    result = run_recipe((folder / "recipe.yml").read_text(), tmp_path / "out")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "omp_record.json").read_text())
    [model] = [model for model in record["models"] if "input" in model["roles"]]
    solve = record["solves"][0]
    said = result.stderr
    start = f"omp of {folder}/base with the tokenizer of {folder}/donor: {record['tokens']} tokens"
    plan = f"2 solves of {solve['targets']} new tokens over {solve['atoms']} anchors with k = 5; peak memory about "
    made = f"{tmp_path}/out has the model: {record['tokens']} tokens, {record['rows']} rows, "
    lines = [start, f"{folder}/base: {model['kept']} tokens kept, {model['lacking']} new (", plan, made]
    places = [said.index(line) for line in lines]
    assert places == sorted(places)
    assert [said.count(line) for line in lines] == [1] * len(lines)
    assert said.index(plan) < said.index("Executing graph") < said.index(made)
    following = [line.split("#")[0].split() for line in said[said.index(made) :].splitlines()[2:]]
    assert following == [words for words, _ in next_commands(f"{tmp_path}/out", f"{folder}/base")]


def test_a_quiet_run_says_nothing(folder: Path, tmp_path: Path) -> None:
    result = run_recipe((folder / "recipe.yml").read_text(), tmp_path / "out", "--quiet")
    assert result.returncode == 0
    assert "mergekit-omp" not in result.stderr


def test_lines_that_cannot_be_made_do_not_stop_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("mergekit_omp.report.run_log.expected_costs", fail)
    monkeypatch.setattr("mergekit_omp.report.run_log.next_steps", fail)
    assert merge_here((folder / "recipe.yml").read_text(), tmp_path / "out").exit_code == 0


def test_next_commands_exist() -> None:
    for words, _ in next_commands("out", "base"):
        assert words[0] == "mergekit-omp"
        assert words[1] in main.commands


@pytest.mark.parametrize(("typed", "completed"), [("in", ["init", "inspect"]), ("d", ["doctor"])])
def test_completion(typed: str, completed: list[str]) -> None:
    """As the last line of the group's help sets it up."""
    [variable] = re.findall(r"(_\w+_COMPLETE)=bash_source", CliRunner().invoke(main, ["--help"]).output)
    script = CliRunner().invoke(main, prog_name="mergekit-omp", env={variable: "bash_source"})
    assert f"{variable}=bash_complete" in script.output
    environment = {variable: "bash_complete", "COMP_WORDS": f"mergekit-omp {typed}", "COMP_CWORD": "1"}
    result = CliRunner().invoke(main, prog_name="mergekit-omp", env=environment)
    assert [line.partition(",")[2] for line in result.output.splitlines()] == completed
