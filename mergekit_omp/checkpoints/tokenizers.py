"""Read a model's tokenizer, and the vocabulary that its embedding has rows for."""

import transformers
from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError


def load_tokenizer(model: ModelReference, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        OmpError: naming the recipe ``key`` that the model stands under, where there is none that can be read.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            model.model.path, revision=model.model.revision, trust_remote_code=trust_remote_code
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever the parsers raise; a panic in tokenizers' Rust is no Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OmpError(
            f"{key}: no tokenizer can be read from {model.model} ({reason}); name a model with a tokenizer."
        ) from error
