"""Zero-shot tokenizer transfer: rows that a published hypernetwork predicts from how a token is written.

After Minixhofer, Ponti and Vulić 2024, arXiv 2405.07883. A hypernetwork is trained for one model. It reads a token as
the pieces that the model's own byte-level vocabulary makes of its bytes (the paper's section 3), looks those up in the
model's input embedding and LM head, and predicts the row that the token would have in each of them. The authors' code
and the checkpoints are at https://github.com/bminixhofer/zett; the checkpoints bring their own module, so that this
runs remote code.

None of the published checkpoints could be downloaded where this was written. It was tried with a small random
checkpoint around the module that the authors publish, and is tested with one of the same interface.

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

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.vocabulary.byte_encoding import as_text
from mergekit_omp.vocabulary.tokens import Token, TokenKind, Vocabulary

LOG = logging.getLogger(__name__)

TARGETS_AT_A_TIME = 1024
"""A batch is a few layers' activations, [targets, L, width of the hypernetwork]; the width is about the model's."""

_KEY = "parameters.hypernetwork"
_EXAMPLE = "benjamin/zett-hypernetwork-Mistral-7B-v0.1"


def check(parameters: OmpParameters, place: str) -> None:
    """Look whether a hypernetwork is named that may be one; a name on the hub is not looked up.

    Raises:
        OmpError: none is named, or a folder that is none.
    """
    named = parameters.hypernetwork
    if named is None:
        raise OmpError(
            f"{place}: approximation: zett needs the hypernetwork of the model; add hypernetwork: and a folder or a "
            f"name on the hub, such as {_EXAMPLE}."
        )
    path = Path(named)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OmpError(
                f"{place}.hypernetwork: the folder {named} has no config.json; name the folder of a checkpoint."
            )
    elif path.exists() or path.is_absolute() or named.startswith(".") or named.count("/") > 1:
        raise OmpError(
            f"{place}.hypernetwork: {named} is no folder; name the folder of a checkpoint, or one on the hub, such as "
            f"{_EXAMPLE}."
        )


def zett(new: NewTokens) -> RowFunction:
    """The hypernetwork's rows, from the model's input embedding and head as they are.

    A token without bytes has no form to predict from; it gets the mean of the anchors' rows. A special token of the
    hypernetwork's tokenizer is one piece; any other special token is read as its text. What is longer than the
    hypernetwork reads is cut off, as in the authors' code. Computed in float32, where the model's matrices are.

    Raises:
        OmpError: the checkpoint cannot be loaded, may not run its code, or is not for this model.
    """
    named = new.parameters.hypernetwork
    assert named is not None, "checked by check()"
    config = _read_config(named, new.trust_remote_code)
    tokenizer = _read_tokenizer(named)
    _check_fit(new, config, tokenizer)
    wanted = [new.output.tokens[id_] for id_ in new.problem.target_ids.tolist()]
    spelled = _spell(wanted, tokenizer)
    longest = config.hn_surface_maxlen
    formless = torch.tensor([not pieces for pieces in spelled], dtype=torch.bool)
    LOG.info(
        "%s: %d new tokens, of which %d are longer than the %d pieces that it reads, and %d have no bytes and get the "
        "mean row",
        named,
        len(wanted),
        sum(len(pieces) > longest for pieces in spelled),
        longest,
        int(formless.sum()),
    )
    predicted = _predict(_load(named, config), _surface_forms(spelled, longest, config.pad_token_id), new)

    def rows(weight: Tensor, is_head: bool) -> Tensor:
        made = predicted[int(is_head)].to(weight.device, copy=True)
        made[formless.to(made.device)] = new.mean_row(weight)
        return made

    return rows


def _spell(tokens: Sequence[Token], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids that the hypernetwork's tokenizer writes each token in, without pre-tokenizing its bytes."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    model = tokenizer.backend_tokenizer.model
    return [
        [special[token.text]]
        if token.kind is TokenKind.SPECIAL and token.text in special
        else [piece.id for piece in model.tokenize(as_text(token.data))]
        for token in tokens
    ]


def _surface_forms(spelled: Sequence[Sequence[int]], longest: int, padding: int) -> Tensor:
    """What the hypernetwork reads, int64 [B, L]: the first L = ``longest`` pieces of each token, then padding."""
    return torch.tensor([[*pieces[:longest], *[padding] * (longest - len(pieces))] for pieces in spelled])


def _predict(hypernetwork: PreTrainedModel, forms: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
    """The rows of the input embedding and of the head, float32 [B, D] each; the same ones for a tied hypernetwork."""
    assert new.own is not None, "asked for in the registry"
    embedding, head = new.own
    config = hypernetwork.config
    hypernetwork.to(embedding.device)  # type: ignore[arg-type]  # of transformers, whose `to` loses self
    parts = [embedding, head] if _has_head(config) else [embedding]
    source = torch.cat([part.float() for part in parts], dim=1)
    made: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for part in forms.to(embedding.device).split(TARGETS_AT_A_TIME):
            of_input, of_head, _bias = hypernetwork(part, target_priors=None, source_embeddings=source)
            made[0].append(of_input.float())
            made[1].append((of_input if of_head is None else of_head).float())
    of_input, of_head = (torch.cat(each) for each in made)
    return of_input, of_head


def _has_head(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "separate_out_embeddings", False))


def _read_config(named: str, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration, by the checkpoint's own class.

    Raises:
        OmpError: there is none, it is not a hypernetwork's, or its code may not run.
    """
    try:
        declared, _ = PretrainedConfig.get_config_dict(named)
    except Exception as error:  # of the network, the hub or the file
        raise _unreadable(named, error) from error
    if not {"AutoConfig", "AutoModel"} <= declared.get("auto_map", {}).keys():
        raise _none_of_zett(named)
    if not trust_remote_code:
        raise OmpError(
            f"{_KEY}: {named} brings code of its own, which is not run unasked; read it, and pass --trust-remote-code "
            "to mergekit-yaml if you trust it."
        )
    try:
        config = AutoConfig.from_pretrained(named, trust_remote_code=True)
    except Exception as error:  # whatever the checkpoint's code raises
        raise _unreadable(named, error) from error
    if not hasattr(config, "hn_surface_maxlen"):
        raise _none_of_zett(named)
    if getattr(config, "hn_embed_lang_id", False):
        raise OmpError(
            f"{_KEY}: {named} is multilingual and wants to be told a language, which a recipe cannot; name one that "
            f"is not, such as {_EXAMPLE}."
        )
    return config


def _read_tokenizer(named: str) -> PreTrainedTokenizerBase:
    """The hypernetwork's tokenizer as its tokenizer.json has it, whatever class its configuration names."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(named)
    except Exception as error:  # of the network, the hub or the file
        raise _unreadable(named, error) from error


def _load(named: str, config: PretrainedConfig) -> PreTrainedModel:
    """The module and its weights, in float32, on the CPU."""
    try:
        module: Any = get_class_from_dynamic_module(config.auto_map["AutoModel"], named)
        if not hasattr(module, "all_tied_weights_keys"):
            # transformers 5 sets this in post_init(), which the published module, being older, does not call
            module.all_tied_weights_keys = {}
        return module.from_pretrained(named, config=config, dtype=torch.float32).eval()
    except Exception as error:  # whatever the checkpoint's code raises
        raise _unreadable(named, error) from error


def _check_fit(new: NewTokens, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The hypernetwork looks its pieces up in the model's matrices, so it must be one for this model.

    Raises:
        OmpError: it is for another width or vocabulary, or predicts no rows for a head that the model has.
    """
    assert new.own is not None, "asked for in the registry"
    embedding, head = new.own
    if config.n_embd != embedding.shape[1]:
        raise OmpError(
            f"{_KEY}: {new.parameters.hypernetwork} is for rows of {config.n_embd} numbers, and the model's have "
            f"{embedding.shape[1]}; name the hypernetwork of this model."
        )
    same, compared = _count_same_tokens(new.model, tokenizer, config.original_vocab_size)
    if config.original_vocab_size > len(embedding) or 2 * same < compared:
        raise OmpError(
            f"{_KEY}: {new.parameters.hypernetwork} is for another vocabulary, of {config.original_vocab_size} "
            f"tokens, of which {same} are where the model has them; name the hypernetwork of this model."
        )
    if not _has_head(config) and not torch.equal(embedding, head):
        raise OmpError(
            f"{_KEY}: {new.parameters.hypernetwork} predicts no rows for an LM head, and the model has one of "
            "its own; name the hypernetwork of this model."
        )


def _count_same_tokens(model: Vocabulary, tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[int, int]:
    """How many of the model's ordinary tokens the hypernetwork has at the same id, and of how many."""
    theirs = {id_: text for text, id_ in tokenizer.get_vocab().items() if id_ < size}
    ours = {id_: token for id_, token in model.tokens.items() if token.kind is TokenKind.ORDINARY and not token.added}
    return sum(theirs.get(id_) == as_text(token.data) for id_, token in ours.items()), len(ours)


def _none_of_zett(named: str) -> OmpError:
    return OmpError(f"{_KEY}: {named} is no hypernetwork of ZeTT; name a checkpoint of one, such as {_EXAMPLE}.")


def _unreadable(named: str, error: Exception) -> OmpError:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    return OmpError(
        f"{_KEY}: the hypernetwork {named} cannot be loaded ({reason}); name the folder of a whole checkpoint, or one "
        "on the hub."
    )
