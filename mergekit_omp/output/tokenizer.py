"""Make sure that the output folder's tokenizer is read back as the one that was written.

For some model types (``qwen2`` is one) transformers 5 builds its own class whatever the folder says, with that class's
pre-tokenizer and decoder. Harmless for the tokenizers that these models were released with, it turns another family's
tokenizer into nonsense.
"""

import json
import logging
from pathlib import Path
from typing import Any

import transformers

LOG = logging.getLogger(__name__)

_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_MODULE = "plain_tokenizer"
_CLASS = "PlainTokenizer"
_SOURCE = f'''"""The tokenizer in tokenizer.json as it is; for this model type transformers would rebuild it."""

from transformers import PreTrainedTokenizerFast


class {_CLASS}(PreTrainedTokenizerFast):
    """Read from tokenizer.json without changes."""
'''


def ensure_read_as_written(folder: Path) -> None:
    """Have ``AutoTokenizer`` read a folder's tokenizer.json unchanged, or warn how to read it.

    A tokenizer whose configuration names a class of its own in ``auto_map`` is not rebuilt. Without
    ``trust_remote_code`` that class is then ignored too, and tokenizer.json read as it is; with it, the class is the
    few lines that are written here beside it.
    """
    if _is_read_as_written(folder):
        return
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "TokenizersBackend", "auto_map": {"AutoTokenizer": [None, f"{_MODULE}.{_CLASS}"]}}
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
    if not _is_read_as_written(folder):
        LOG.warning(
            "AutoTokenizer does not read this model's tokenizer as it is; load it with "
            "transformers.PreTrainedTokenizerFast.from_pretrained(<the output folder>)."
        )


def _is_read_as_written(folder: Path) -> bool:
    written = folder / "tokenizer.json"
    if not written.exists():
        return True  # a tokenizer without this file is read by the class that its configuration names
    read = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    backend = getattr(read, "backend_tokenizer", None)
    if backend is None:
        return False
    return _parts(json.loads(backend.to_str())) == _parts(json.loads(written.read_text(encoding="utf-8")))


def _parts(described: dict[str, Any]) -> list[Any]:
    return [described[part] for part in _PARTS] + [described["model"]["type"], len(described["model"]["vocab"])]
