"""Run a complete model in a merge, and estimate the common direction of its last states for ``numerals: digits``."""

import logging

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import WINDOW_BYTES, builtin_texts, windows
from mergekit_omp.initializers.digits import LogitShift
from mergekit_omp.recipe.transplant import RecipeModel
from mergekit_omp.tasks.placement import on_the_cpu
from mergekit_omp.tasks.resolved import Resolved

LOG = logging.getLogger(__name__)

RIDGE = 1.0
"""Ridge λ relative to the mean diagonal of HᵀH / T. 0.1 and 0.01 have the same quality but change the rows of a tied
embedding more; the mean itself, without weighting, is worse (docs/quality.md)."""


class FindLogitShift(Task[LogitShift]):
    """Find the direction along which rows of a model's LM head change their logits equally in all contexts.

    With the last hidden states H (T, D) on a text and their mean m it is u = (HᵀH / T + λ)⁻¹ m, scaled to u · m = 1:
    adding u to a row increases its logit by 1 on average, and by nearly 1 in every context. The complete model is
    loaded for forward passes and released; nothing is trained.
    """

    model: Resolved[RecipeModel]

    def arguments(self) -> dict[str, Task]:
        """Return no tasks: transformers loads the model."""
        return {}

    @on_the_cpu
    def execute(self, **_kwargs: object) -> LogitShift:
        """Run the model on the first window of each built-in tuning text."""
        model = load_complete(self.model, "numerals: digits")
        tokenizer = self.model.tokenizer
        texts = [windows(text, WINDOW_BYTES)[0] for text in builtin_texts("tuning").values()]
        return logit_shift(model, [tokenizer(text).input_ids for text in texts])


@torch.inference_mode()
def logit_shift(model: PreTrainedModel, texts: list[list[int]]) -> LogitShift:
    """Compute the logit shift of a causal language model from tokenised texts."""
    head = model.get_output_embeddings()
    head_weight = head.get_parameter("weight")
    states: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _head, inputs: states.append(inputs[0][0].float()))
    try:
        scales = []
        for ids in texts:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].float()
            plain = torch.nn.functional.linear(states[-1], head_weight.float())
            # Some models scale or cap their logits, which changes the effect of a row by the same factor.
            scales.append((plain * logits).sum() / (plain * plain).sum())
    finally:
        hook.remove()
    hidden = torch.cat(states).double()
    mean = hidden.mean(dim=0)
    second_moment = hidden.T @ hidden / len(hidden)
    second_moment.diagonal().add_(RIDGE * second_moment.diagonal().mean())
    direction = torch.linalg.solve(second_moment, mean)
    direction /= (direction @ mean) * torch.stack(scales).mean()
    tied = head_weight is model.get_input_embeddings().get_parameter("weight")
    return LogitShift(direction.float().clone(), tied)


def find_logit_shift(model: RecipeModel) -> FindLogitShift:
    """Return the task for one model.

    Raises:
        OmpError: if it is not a causal language model.
    """
    check_runs(model, "numerals: digits")
    return FindLogitShift(model=model)


def load_complete(model: RecipeModel, setting: str) -> PreTrainedModel:
    """Load an input of the merge with its adapter, in its own dtype, on the CPU and in evaluation mode.

    Args:
        model: the input.
        setting: what it runs for, such as ``numerals: digits``, for the log.
    """
    LOG.info("Running %s on a text for %s", model, setting)
    loader = LoaderCache()
    trust = loader.trust_remote_code
    merged = model.reference.merged(loader.lora_cache_dir, trust, loader.lora_merge_dtype)
    path = merged.local_path(loader.hf_cache_dir)
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=trust).eval()


def check_runs(model: RecipeModel, setting: str) -> None:
    """Raise an OmpError unless an input is a causal language model, which a setting such as ``key: value`` runs."""
    config = model.config
    assert config is not None, "every input is a model"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        raise OmpError(
            f"{setting} runs the model on a text, but {model} ({config.model_type}) is not a causal language "
            f"model; remove {setting.partition(':')[0]}."
        )
