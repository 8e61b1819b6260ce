"""ZeTT: zero-shot tokenizer transfer with a published hypernetwork that predicts rows from the pieces of a token.

Source: Minixhofer, Ponti & Vulić (2024), arXiv:2405.07883. A hypernetwork is trained for one model. Its input is the
segmentation of a token's bytes in the model's own byte-level vocabulary (section 3 of the paper). It looks the pieces
up in the model's input embedding and LM head, and predicts the token's row in both. The authors' code and checkpoints
are at https://github.com/bminixhofer/zett; the checkpoints contain their own module, so this runs remote code.

This module has not been run with a published checkpoint, since none could be downloaded. It was run with a small
random checkpoint of the authors' module, and the tests use one with the same interface.

Letters in shapes: B targets, R rows of the model, D its width, L pieces that the hypernetwork reads.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from mergekit_omp.errors import OmpError, first_line
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.vocabulary.byte_encoding import as_text
from mergekit_omp.vocabulary.tokens import Token, TokenKind, Vocabulary

LOG = logging.getLogger(__name__)

TARGETS_PER_BATCH = 1024
"""Targets per batch, which needs a few layers' activations (targets, L, width); the width is about the model's."""

_KEY = "parameters.hypernetwork"
_EXAMPLE = "benjamin/zett-hypernetwork-Mistral-7B-v0.1"


def check_zett(parameters: OmpParameters, place: str) -> None:
    """Check that a hypernetwork is set and, if it is a folder, exists; a hub id is not looked up.

    Args:
        parameters: parameters of the recipe.
        place: their path in the recipe, for messages.

    Raises:
        OmpError: if no hypernetwork is set, or the folder does not exist or has no configuration.
    """
    named = parameters.hypernetwork
    if named is None:
        raise OmpError(
            f"{place}: approximation: zett needs the hypernetwork of the model; add hypernetwork: and a folder or a "
            f"hub id, such as {_EXAMPLE}."
        )
    path = Path(named)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OmpError(
                f"{place}.hypernetwork: the folder {named} has no config.json; name the folder of a checkpoint."
            )
    elif path.exists() or path.is_absolute() or named.startswith(".") or named.count("/") > 1:
        raise OmpError(
            f"{place}.hypernetwork: {named} is not a folder; name the folder of a checkpoint, or a hub id such as "
            f"{_EXAMPLE}."
        )


def zett(new: NewTokens) -> RowFunction:
    """Predict rows with the hypernetwork from the model's input embedding and LM head.

    A token without bytes has no pieces and gets the mean of the anchors' rows. A special token of the hypernetwork's
    tokenizer is one piece; any other special token is segmented as text. Pieces beyond the hypernetwork's limit are
    cut off, as in the authors' code. Computed in float32, on the device of the model's matrices.

    Raises:
        OmpError: if the checkpoint cannot be loaded, its code is not trusted, or it is not for this model.
    """
    named = new.parameters.hypernetwork
    assert named is not None, "checked by check_zett()"
    config = _read_config(named, new.trust_remote_code)
    tokenizer = _read_tokenizer(named)
    _check_fit(new, config, tokenizer)
    tokens = [new.output.tokens[id_] for id_ in new.problem.target_ids.tolist()]
    spelled = _spell(tokens, tokenizer)
    max_pieces = config.hn_surface_maxlen
    without_pieces = torch.tensor([not pieces for pieces in spelled], dtype=torch.bool)
    LOG.info(
        "%s: %d new tokens, of which %d have more than the %d pieces that it reads, and %d have no bytes and get the "
        "mean row",
        named,
        len(tokens),
        sum(len(pieces) > max_pieces for pieces in spelled),
        max_pieces,
        int(without_pieces.sum()),
    )
    predicted = _predict(
        _load_hypernetwork(named, config), _surface_forms(spelled, max_pieces, config.pad_token_id), new
    )

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        new_rows = predicted[int(is_head)].to(weight.device, copy=True)
        new_rows[without_pieces.to(new_rows.device)] = new.mean_row(weight)
        return new_rows

    return rows


def _spell(tokens: Sequence[Token], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Segment each token with the hypernetwork's tokenizer, without pre-tokenization."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    model = tokenizer.backend_tokenizer.model
    return [
        [special[token.text]]
        if token.kind is TokenKind.SPECIAL and token.text in special
        else [piece.id for piece in model.tokenize(as_text(token.data))]
        for token in tokens
    ]


def _surface_forms(spelled: Sequence[Sequence[int]], max_pieces: int, padding: int) -> Tensor:
    """Return the hypernetwork's input int64 (B, L): the first L = ``max_pieces`` pieces of each token, padded."""
    return torch.tensor([[*pieces[:max_pieces], *[padding] * (max_pieces - len(pieces))] for pieces in spelled])


def _predict(hypernetwork: PreTrainedModel, forms: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
    """Predict rows of the input embedding and of the LM head, float32 (B, D) each; they are equal for a tied one."""
    assert new.embedding_and_head is not None, "requested in the registry"
    embedding, head = new.embedding_and_head
    config = hypernetwork.config
    hypernetwork.to(embedding.device)  # type: ignore[arg-type]  # transformers' annotation of `to` lacks self
    parts = [embedding, head] if _has_head(config) else [embedding]
    source = torch.cat([part.float() for part in parts], dim=1)
    predicted: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for part in forms.to(embedding.device).split(TARGETS_PER_BATCH):
            of_input, of_head, _bias = hypernetwork(part, target_priors=None, source_embeddings=source)
            predicted[0].append(of_input.float())
            predicted[1].append((of_input if of_head is None else of_head).float())
    of_input, of_head = (torch.cat(batches) for batches in predicted)
    return of_input, of_head


def _has_head(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "separate_out_embeddings", False))


def _read_config(named: str, trust_remote_code: bool) -> PretrainedConfig:
    """Read the configuration with the checkpoint's own class.

    Raises:
        OmpError: if there is none, it is not that of a hypernetwork, or its code is not trusted.
    """
    try:
        declared, _ = PretrainedConfig.get_config_dict(named)
    except Exception as error:  # errors of the network, the hub or the file
        raise _unreadable(named, error) from error
    if not {"AutoConfig", "AutoModel"} <= declared.get("auto_map", {}).keys():
        raise _not_zett(named)
    if not trust_remote_code:
        raise OmpError(
            f"{_KEY}: {named} contains code, which does not run without permission; read it, and pass "
            "--trust-remote-code to mergekit-yaml if you trust it."
        )
    try:
        config = AutoConfig.from_pretrained(named, trust_remote_code=True)
    except Exception as error:  # arbitrary errors of the checkpoint's code
        raise _unreadable(named, error) from error
    if not hasattr(config, "hn_surface_maxlen"):
        raise _not_zett(named)
    if getattr(config, "hn_embed_lang_id", False):
        raise OmpError(
            f"{_KEY}: {named} is multilingual and requires a language id, which recipes cannot set; name a "
            f"monolingual one, such as {_EXAMPLE}."
        )
    return config


def _read_tokenizer(named: str) -> PreTrainedTokenizerBase:
    """Load the hypernetwork's tokenizer from tokenizer.json, whatever class its configuration names."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(named)
    except Exception as error:  # errors of the network, the hub or the file
        raise _unreadable(named, error) from error


def _load_hypernetwork(named: str, config: PretrainedConfig) -> PreTrainedModel:
    """Load the module and its weights in float32 on the CPU."""
    try:
        module: Any = get_class_from_dynamic_module(config.auto_map["AutoModel"], named)
        if not hasattr(module, "all_tied_weights_keys"):
            # transformers 5 sets this in post_init(), which the published, older module does not call
            module.all_tied_weights_keys = {}
        return module.from_pretrained(named, config=config, dtype=torch.float32).eval()
    except Exception as error:  # arbitrary errors of the checkpoint's code
        raise _unreadable(named, error) from error


def _check_fit(new: NewTokens, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the hypernetwork is for this model, since it looks pieces up in the model's matrices.

    Raises:
        OmpError: if it is for another width or vocabulary, or predicts no rows for the model's LM head.
    """
    assert new.embedding_and_head is not None, "requested in the registry"
    embedding, head = new.embedding_and_head
    if config.n_embd != embedding.shape[1]:
        raise OmpError(
            f"{_KEY}: {new.parameters.hypernetwork} is for rows of width {config.n_embd}, but the model's have "
            f"width {embedding.shape[1]}; name the hypernetwork of this model."
        )
    same, compared = _count_same_tokens(new.model, tokenizer, config.original_vocab_size)
    if config.original_vocab_size > len(embedding) or 2 * same < compared:
        raise OmpError(
            f"{_KEY}: {new.parameters.hypernetwork} is for another vocabulary, of {config.original_vocab_size} "
            f"tokens, of which {same} have the same id in the model; name the hypernetwork of this model."
        )
    if not _has_head(config) and not torch.equal(embedding, head):
        raise OmpError(
            f"{_KEY}: {new.parameters.hypernetwork} predicts no rows for an LM head, but the model has a separate "
            "one; name the hypernetwork of this model."
        )


def _count_same_tokens(model: Vocabulary, tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[int, int]:
    """Count the model's ordinary tokens with the same id in the hypernetwork's tokenizer, and all of them."""
    text_of_id = {id_: text for text, id_ in tokenizer.get_vocab().items() if id_ < size}
    ordinary = {
        id_: token for id_, token in model.tokens.items() if token.kind is TokenKind.ORDINARY and not token.added
    }
    return sum(text_of_id.get(id_) == as_text(token.data) for id_, token in ordinary.items()), len(ordinary)


def _not_zett(named: str) -> OmpError:
    return OmpError(f"{_KEY}: {named} is not a hypernetwork of ZeTT; name a checkpoint such as {_EXAMPLE}.")


def _unreadable(named: str, error: Exception) -> OmpError:
    return OmpError(
        f"{_KEY}: the hypernetwork {named} cannot be loaded ({first_line(error)}); name the folder of a complete "
        "checkpoint, or a hub id."
    )
