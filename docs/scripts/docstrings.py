"""A griffe extension: read the docstrings of this project as mkdocstrings wants them."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turn ``Example:`` into the section that griffe reads doctests in, and Sphinx's roles into code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _ROLE.sub(r"`\1`", text)
