"""The processor of a model that reads images or sound: its files, and the tokens that it puts where those are."""

from pathlib import Path

from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

_STANDARD = {f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


def processor_files(model: ModelReference) -> list[Path]:
    """The files that a model's processor is described by; [] for a model that reads text alone."""
    found = [
        cached_file(
            model.model.path,
            name,
            revision=model.model.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        for name in FILES
    ]
    return [Path(path) for path in found if path is not None]


def named_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokens that a tokenizer has a name of its own for, such as ``image_token``: processors ask for them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name not in _STANDARD}
