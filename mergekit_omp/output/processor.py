"""Copy the processor of a base with image or audio input, so that ``AutoProcessor`` loads the output."""

import shutil
from pathlib import Path

from mergekit_omp.checkpoints.files import processor_files, read_json
from mergekit_omp.checkpoints.tokenizers import named_tokens
from mergekit_omp.output.tokenizer import write_json
from mergekit_omp.recipe.transplant import Transplant


def copy_processor(folder: Path, transplant: Transplant) -> None:
    """Copy the base's processor files, and register its named tokens in the output tokenizer.

    mergekit copies some of these files for some architectures. For others it copies vocab.json, which is the
    vocabulary of the base and therefore removed here.
    """
    if (folder / "tokenizer.json").exists():
        (folder / "vocab.json").unlink(missing_ok=True)
    files = processor_files(transplant.base.reference)
    if not files:
        return
    for path in files:
        shutil.copyfile(path, folder / path.name)
    texts = {token.text for token in transplant.vocabulary.tokens.values()}
    names = {name: text for name, text in named_tokens(transplant.base.tokenizer).items() if text in texts}
    config = folder / "tokenizer_config.json"
    settings = read_json(config)
    extra = settings.get("extra_special_tokens") or {}
    if isinstance(extra, list):  # of a tokenizer without a tokenizer.json; transformers 5 reads names as keys, too
        settings |= names
    else:
        settings["extra_special_tokens"] = names | extra
    write_json(config, settings)
