"""What a model's last hidden states have in common, found by letting it read a text; for ``numerals: digits``."""

import logging

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from pydantic import InstanceOf
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import WINDOW_BYTES, builtin_texts, windows
from mergekit_omp.initializers.digits import LogitShift
from mergekit_omp.recipe.transplant import RecipeModel
from mergekit_omp.tasks.placement import on_the_cpu

LOG = logging.getLogger(__name__)

RIDGE = 1.0
"""As a share of the mean diagonal of HᵀH / T. 0.1 and 0.01 do as well, but change a tied embedding's rows more; m
itself, unweighted, does worse (docs/quality.md)."""


class FindLogitShift(Task[LogitShift]):
    """Find the direction in which rows of a model's LM head move their logits alike in all contexts.

    With H the last hidden states [T, D] over a text and m their mean, it is u = (HᵀH / T + λ)⁻¹ m, scaled so that
    u · m = 1: a row that has u added has its logit raised by 1 on average, and by nearly 1 everywhere. The whole
    model is loaded for it, and let go again; forward passes only, nothing is trained.
    """

    model: InstanceOf[RecipeModel]

    def arguments(self) -> dict[str, Task]:
        """No task: transformers loads the model."""
        return {}

    @on_the_cpu
    def execute(self, **_kwargs: object) -> LogitShift:
        """Read the first windows of the built-in texts that methods were tuned on."""
        LOG.info("Reading a text with %s, for numerals: digits", self.model)
        loader = LoaderCache()
        trust = loader.trust_remote_code
        merged = self.model.reference.merged(loader.lora_cache_dir, trust, loader.lora_merge_dtype)
        path = merged.local_path(loader.hf_cache_dir)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=trust)
        tokenizer = self.model.tokenizer
        texts = [windows(text, WINDOW_BYTES)[0] for text in builtin_texts("tuning").values()]
        return logit_shift(model.eval(), [tokenizer(text).input_ids for text in texts])


@torch.inference_mode()
def logit_shift(model: PreTrainedModel, texts: list[list[int]]) -> LogitShift:
    """The shift of a causal language model of transformers, from the ids of some texts."""
    head = model.get_output_embeddings()
    head_weight = head.get_parameter("weight")
    states: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _head, inputs: states.append(inputs[0][0].float()))
    try:
        scales = []
        for ids in texts:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].float()
            plain = torch.nn.functional.linear(states[-1], head_weight.float())
            # Some models scale or cap their logits; a row moves them by as much.
            scales.append((plain * logits).sum() / (plain * plain).sum())
    finally:
        hook.remove()
    read = torch.cat(states).double()
    mean = read.mean(dim=0)
    spread = read.T @ read / len(read)
    spread.diagonal().add_(RIDGE * spread.diagonal().mean())
    direction = torch.linalg.solve(spread, mean)
    direction /= (direction @ mean) * torch.stack(scales).mean()
    tied = head_weight is model.get_input_embeddings().get_parameter("weight")
    return LogitShift(direction.float().clone(), tied)


def find_logit_shift(model: RecipeModel) -> FindLogitShift:
    """The task for one model.

    Raises:
        OmpError: it is no causal language model.
    """
    config = model.config
    assert config is not None, "every input is a model"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        raise OmpError(
            f"numerals: digits reads a text with the model, and {model} ({config.model_type}) is no causal language "
            "model; leave it out."
        )
    return FindLogitShift(model=model)
