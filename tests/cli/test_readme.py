"""README tells what is there."""

import re
from pathlib import Path

from click.testing import CliRunner

from mergekit_omp.cli.main import main
from mergekit_omp.parameters import OmpParameters

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_every_parameter_is_described() -> None:
    for name, field in OmpParameters.model_fields.items():
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(field.description)} \|$", README, re.MULTILINE), name


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if not (PROJECT / link).exists()] == []


def test_commands_exist() -> None:
    named = set(re.findall(r"^mergekit-omp (\w+)", README, re.MULTILINE))
    assert named == set(main.commands)
    assert all(CliRunner().invoke(main, [name, "--help"]).exit_code == 0 for name in named)
