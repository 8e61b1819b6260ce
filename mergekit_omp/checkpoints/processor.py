"""The processor of a model that reads images or sound: its files, and the tokens that it puts where those are."""

from pathlib import Path

from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase

from mergekit_omp.checkpoints.files import find_file

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

_STANDARD = {f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


def processor_files(model: ModelReference) -> list[Path]:
    """The files that a model's processor is described by; [] for a model that reads text alone."""
    found = (find_file(model, name) for name in FILES)
    return [path for path in found if path is not None]


def named_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokens that a tokenizer has a name of its own for, such as ``image_token``: processors ask for them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name not in _STANDARD}
