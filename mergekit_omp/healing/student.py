"""The model that is trained: which of its parameters, and how it becomes an ordinary model again."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergekit_omp.errors import OmpError
from mergekit_omp.healing.options import ROWS_SHARE, HealOptions, Train


class Student:
    """A model with trainable parameters in float32, and the rest of it as it was loaded."""

    def __init__(self, model: PreTrainedModel, options: HealOptions) -> None:
        """Choose what to train, and add adapters where they are asked for.

        Raises:
            OmpError: the model has no linear layers that adapters fit.
        """
        self._network: Any = model
        model.config.use_cache = False
        model.requires_grad_(options.train is Train.FULL)
        if options.train in (Train.LORA, Train.ROWS_AND_LORA):
            self._network = _with_adapters(model, options.rank)
        self._rows = _unfreeze_rows(model) if options.train in (Train.ROWS, Train.ROWS_AND_LORA) else []
        for parameter in self._trained():
            parameter.data = parameter.data.float()
        # The residual stream stays in the type that the model computes in, as without float32 rows.
        dtype = getattr(torch, options.dtype)
        self._hook = model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.to(dtype))
        self._autocast = torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not torch.float32)

    def logits(self, ids: Tensor) -> Tensor:
        """Run the model over ids (N, T); returns (N, T, V)."""
        with self._autocast:
            return self._network(input_ids=ids, use_cache=False).logits

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Group the trained parameters by their learning rate."""
        rows = {id(parameter) for parameter in self._rows}
        others = [parameter for parameter in self._trained() if id(parameter) not in rows]
        groups = [
            {"params": others, "lr": learning_rate},
            {"params": self._rows, "lr": learning_rate * (ROWS_SHARE if others else 1.0)},
        ]
        return [group for group in groups if group["params"]]

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return list(self._trained())

    def state(self) -> dict[str, Tensor]:
        """Copy what is trained to memory."""
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in self._network.named_parameters()
            if parameter.requires_grad
        }

    def finished(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
        """Give the model a state, merge adapters into its weights, and cast it to ``dtype``."""
        self._network.float()  # adapters are added before anything is rounded
        for name, parameter in self._network.named_parameters():
            if name in state:
                parameter.data.copy_(state[name])
        self._hook.remove()
        model = self._network.merge_and_unload() if hasattr(self._network, "merge_and_unload") else self._network
        model.config.use_cache = True
        return model.to(dtype).eval()

    def enable_checkpointing(self) -> None:
        """Compute activations twice instead of keeping them."""
        self._network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._network.train(mode)

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._network.parameters() if parameter.requires_grad)


def _with_adapters(model: PreTrainedModel, rank: int) -> Any:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise OmpError(
            f"train: peft finds no layers for adapters in {model.config.model_type} ({error}); write train: full."
        ) from error


def _unfreeze_rows(model: PreTrainedModel) -> list[nn.Parameter]:
    """Let the vocabulary matrices be trained; one where they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [module.get_parameter("weight") for module in modules if module is not None]
    rows = {id(weight): weight for weight in weights}
    for parameter in rows.values():
        parameter.requires_grad_(True)
    return list(rows.values())
