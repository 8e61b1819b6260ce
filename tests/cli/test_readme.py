"""README and the documentation tell what is there."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, save, sentencepiece_tokenizer
from helpers.commands import merge_here
from transformers import AutoTokenizer

from mergekit_omp.cli.main import main
from mergekit_omp.parameters import OmpParameters

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"\bmergekit-omp ([a-z]\w*)")
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def code_of(text: str) -> str:
    """The code blocks and the inline code of a page."""
    return "\n".join(CODE.findall(text))


def sentences(text: str) -> list[str]:
    """The sentences of a page's paragraphs and lists."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^[|#!].*$", "", text, flags=re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", text)
    return [part for paragraph in paragraphs for part in re.split(r"(?<=[.!?:])\s", " ".join(paragraph.split()))]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert [sentence for sentence in sentences(README) if len(sentence.split()) >= 30] == []


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if not (PROJECT / link).exists()] == []


def test_every_command_is_named() -> None:
    assert set(COMMAND.findall(code_of(README))) >= set(main.commands)


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_exist(page: str) -> None:
    named = set(COMMAND.findall(code_of((PROJECT / page).read_text(encoding="utf-8"))))
    assert named <= set(main.commands)
    assert all(CliRunner().invoke(main, [name, "--help"]).exit_code == 0 for name in named)


def test_every_parameter_is_in_the_reference() -> None:
    """The page says which parameters its generated tables have."""
    page = (PROJECT / "docs/reference/recipe.md").read_text(encoding="utf-8")
    listed = [name for names in re.findall(r"<!-- table: parameters ([\w ]+)-->", page) for name in names.split()]
    assert sorted(listed) == sorted(OmpParameters.model_fields)


def test_the_first_recipe_runs(tmp_path: Path) -> None:
    """The recipe as README shows it, with small models in place of those that it names."""
    [recipe] = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    donor = sentencepiece_tokenizer(PYTHON, size=380)
    base = byte_level_tokenizer(ENGLISH, size=400)
    for key, name, tokenizer in (("model", "base", base), ("source", "donor", donor)):
        folder = save(tmp_path / name, make_model(tokenizer), tokenizer)
        recipe, count = re.subn(rf"(\b{key}: )\S+/\S+", rf"\g<1>{folder}", recipe)
        assert count == 1
    result = merge_here(recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == donor.get_vocab()
