"""Hooks of ``mkdocs build``: pages made from the code and from files outside of ``docs/``.

- ``CHANGELOG.md`` and the solver's benchmark become pages, and ``benchmarks/growth.png`` a picture of one.
- ``<!-- table: parameters ... -->`` in a page becomes a table of the fields of ``OmpParameters`` that it names.
- ``<!-- source: FILE NAME -->`` becomes the source text of that function or class.
- Links of a page to files of the repository outside of ``docs/`` become links into ``repo_url`` where mkdocs.yml has
  one, and the file's path as code elsewhere. A link to a file that does not exist is a warning, hence an error with
  ``--strict``.
"""

from __future__ import annotations

import ast
import json
import logging
import posixpath
import re
from enum import Enum
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mergekit_omp.parameters import OmpParameters

LOG = logging.getLogger("mkdocs.hooks")

PROJECT = Path(__file__).parents[2]

OUTSIDE = {
    "changelog.md": "CHANGELOG.md",
    "solver-benchmark.md": "benchmarks/solver.md",
    "assets/growth.png": "benchmarks/growth.png",
}
"""Path in the site, and the file of the repository that is there."""

_TABLE = re.compile(r"<!-- table: parameters(?P<names>[\w\s]*)-->")
_SOURCE = re.compile(r"<!-- source: (?P<file>\S+) (?P<name>\w+) -->")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that lie outside of ``docs/``."""
    for place, name in OUTSIDE.items():
        source = PROJECT / name
        if source.exists():
            files.append(File.generated(config, place, abs_src_path=str(source)))
        else:
            files.append(File.generated(config, place, content=f"# {Path(name).stem.title()}\n\nThere is none yet.\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables of a page, and make its links to files of the repository work in the site."""
    markdown = _TABLE.sub(lambda match: parameter_table(match["names"].split()), markdown)
    markdown = _SOURCE.sub(lambda match: f"```python\n{source_of(match['file'], match['name'])}\n```", markdown)
    return _LINK.sub(lambda match: _link(match, page.file.src_uri, config, files), markdown)


def parameter_table(names: list[str]) -> str:
    """Make a Markdown table of parameters, in the order of their definition.

    Args:
        names: of the parameters; all of them where the list is empty.

    Raises:
        KeyError: a name is not a parameter.
    """
    for name in names:
        OmpParameters.model_fields[name]
    lines = ["| parameter | default | meaning |", "|---|---|---|"]
    for name, field in OmpParameters.model_fields.items():
        if not names or name in names:
            default = field.default.value if isinstance(field.default, Enum) else field.default
            shown = "" if default is None else f"`{json.dumps(default) if not isinstance(default, str) else default}`"
            description = re.sub(r"docs/(\w+)\.md", r"[\1](../\1.md)", field.description or "")
            lines.append(f"| `{name}` | {shown} | {description} *{_values(field.annotation)}.* |")
    return "\n".join(lines)


def source_of(file: str, name: str) -> str:
    """Return the text of a function or class at the top of a file of the repository.

    Raises:
        ValueError: the file has none of that name.
    """
    text = (PROJECT / file).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ast.get_source_segment(text, node) or ""
    raise ValueError(f"{file} has no function or class {name}")


def _values(annotation: Any) -> str:
    """Say which values a field takes: the names of an enum, or the name of a type."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "One of " + ", ".join(f"`{member.value}`" for member in annotation)
    text = getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)
    for part, words in (("ByteSize", "A size"), ("bool", "True or false"), ("int", "An integer"), ("str", "Text")):
        if part in text:
            return words
    return "A number"


def _link(match: re.Match[str], page: str, config: MkDocsConfig, files: Files) -> str:
    """Return a link as it should be in the site; ``page`` is the page's path in ``docs/``."""
    text, target, anchor = match["text"], match["target"], match["anchor"] or ""
    if re.match(r"[a-z]+:", target):
        return match[0]
    source = OUTSIDE.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    place = next((place for place, name in OUTSIDE.items() if name == path), path.removeprefix("docs/"))
    if files.get_file_from_path(place) is not None or (path.startswith("docs/") and page not in OUTSIDE):
        return f"[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"
    if not (PROJECT / path).exists():
        LOG.warning("%s links to %s, which does not exist", page, path)
    if config.repo_url:
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
    return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"
