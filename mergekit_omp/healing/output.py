"""Write a healed model: its weights beside the other files of the model that it was."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedModel

from mergekit_omp.checkpoints.files import read_settings
from mergekit_omp.checkpoints.models import reference_of
from mergekit_omp.errors import failures_as
from mergekit_omp.report.fingerprints import fingerprints
from mergekit_omp.report.record import FORMAT, RECORD_FILE, write_record

CARD = "README.md"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json")
_LEFT_OUT = (RECORD_FILE, "omp_report.html", "model.safetensors.index.json")


def write_model(
    folder: Path, model: PreTrainedModel, source: Path, record: Mapping[str, Any], heal: Mapping[str, Any]
) -> None:
    """Write a model to a folder, with the configuration, tokenizer and other files that it had.

    Args:
        folder: where to write.
        model: the healed model.
        source: the folder of the model that it was.
        record: the record of that model.
        heal: what the new record has on the healing.
    """
    model.generation_config = GenerationConfig()  # the file is copied; what is invalid in it must not stop this
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _LEFT_OUT:
            shutil.copyfile(path, folder / path.name)
    described = {"format": FORMAT, **record, "heal": heal}
    if "sha256" in described:
        described["sha256"] = fingerprints(folder, described["sha256"]["tensors"])
    write_record(folder, described)
    card = folder / CARD
    before = card.read_text(encoding="utf-8") if card.exists() else f"# {folder.name}\n"
    card.write_text(f"{before.rstrip()}\n\n{card_section(heal)}", encoding="utf-8")


def folder_of(model: str) -> Path:
    """Return a model's folder, downloading it from the hub where it is not one.

    Raises:
        OmpError: it cannot be downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    path = reference_of(model, "model").model
    with failures_as(
        lambda reason: (
            f"model: {model} is neither a folder nor a model that the hub gives ({reason}); write "
            "<owner>/<name> or a path."
        )
    ):
        return Path(snapshot_download(path.path, revision=path.revision))


def record_of(source: Path) -> dict[str, Any]:
    """Return the record in the folder of a model; {} if there is none."""
    return read_settings(reference_of(source, "model"), RECORD_FILE)


def card_section(heal: Mapping[str, Any]) -> str:
    """Markdown on how a model was healed, for the end of its card."""
    first, last = heal["checks"][0], heal["written"]
    return (
        "### Healing\n\n"
        f"Trained on {last['tokens']:,} tokens ({heal['texts_from']}) in {heal['seconds'] / 60:.1f} minutes against "
        f"{heal['base']}, objective {heal['objective']}, parameters {heal['train']}: "
        f"{first['bits_per_byte']:.3f} → {last['bits_per_byte']:.3f} bits per byte of held-out text; "
        f"the base with its own tokenizer has {heal['base_bits_per_byte']:.3f}.\n"
    )
