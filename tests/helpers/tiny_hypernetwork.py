"""Define a hypernetwork with the interface of ZeTT's published ones, and few parameters.

Its checkpoints contain this file as their code. Like the published module it takes surface forms and the model's two
matrices side by side, looks the forms up in them, scales each dimension, and does not call ``post_init()``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CLASSES = {"AutoConfig": "tiny_hypernetwork.TinyConfig", "AutoModel": "tiny_hypernetwork.TinyHypernetwork"}
HIDDEN = 16


class TinyConfig(PretrainedConfig):
    model_type = "tiny_hypernetwork"


class Scaler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(1, width) + 0.5)
        self.shift = nn.Parameter(torch.randn(1, width))

    def forward(self, rows: Tensor) -> Tensor:
        return self.factor * rows + self.shift


class TinyHypernetwork(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        width = config.n_embd * (2 if config.separate_out_embeddings else 1)
        self.scale_in = Scaler(width)
        self.extra = nn.Embedding(3, width)
        self.project_in = nn.Linear(width, HIDDEN)
        self.positions = nn.Embedding(config.hn_surface_maxlen, HIDDEN)
        self.layer = nn.TransformerEncoderLayer(HIDDEN, nhead=2, dim_feedforward=32, batch_first=True)
        self.project_out = nn.Linear(HIDDEN, config.n_embd)
        self.project_head = nn.Linear(HIDDEN, config.n_embd)
        self.scale_out = Scaler(config.n_embd)

    def forward(
        self,
        target_surface_forms: Tensor,
        target_priors: Tensor | None = None,
        source_embeddings: Tensor | None = None,
        lang_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        assert target_priors is None
        assert lang_index is None
        size = self.config.original_vocab_size
        own = embedding(target_surface_forms.clamp(max=size - 1), source_embeddings)
        extra = self.extra((target_surface_forms - size).clamp(min=0))
        read = torch.where((target_surface_forms >= size)[..., None], extra, self.scale_in(own))
        read = self.project_in(read) + self.positions.weight
        state = self.layer(read, src_key_padding_mask=target_surface_forms == self.config.pad_token_id)[:, 0]
        of_head = self.project_head(state) if self.config.separate_out_embeddings else None
        return self.scale_out(self.project_out(state)), of_head, state[:, 0]


def save_hypernetwork(folder: Path, tokenizer: PreTrainedTokenizerBase, **config: Any) -> TinyHypernetwork:
    """Write a checkpoint with random weights for the model of a tokenizer, and return its module."""
    settings = {
        "model_type": "tiny_hypernetwork",
        "architectures": ["TinyHypernetwork"],
        "auto_map": CLASSES,
        "hn_surface_maxlen": 3,
        "hn_embed_lang_id": False,
        "n_embd": 12,
        "separate_out_embeddings": True,
        "original_vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    shutil.copy(__file__, folder / "tiny_hypernetwork.py")
    torch.manual_seed(0)
    module = TinyHypernetwork(TinyConfig(**settings)).eval()
    save_file(module.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return module
