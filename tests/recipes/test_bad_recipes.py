"""Test the message for every mistake in a recipe or its files, and that nothing is written.

Recipes run through the real click command. Invalid YAML, and a ``merge_method`` of mergekit, are reported by mergekit
itself.
"""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    cut_rows,
    make_model,
    refused,
    save,
    sentencepiece_tokenizer,
)
from helpers.commands import merge_here, refusal
from helpers.versions import has
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_omp.parameters import OmpParameters

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DROP = object()


@dataclass
class World:
    """Three models: a base, a donor of another width, and one that can be merged with the base."""

    root: Path
    base: Path
    donor: Path
    other: Path
    bad: Path | None = None

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """Return a working recipe with the changes applied."""
        recipe = {
            "merge_method": "omp",
            "models": self.models(self.base),
            "tokenizer": {"source": str(self.donor)},
            "parameters": {"k": 5},
            "dtype": "float32",
        }
        return {key: value for key, value in (recipe | changes).items() if value is not DROP}

    def models(self, *folders: Path | str, **more: Any) -> list[dict[str, Any]]:
        return [{"model": str(folder), **more} for folder in folders]

    def slices(self, *layer_range: int, **more: Any) -> dict[str, Any]:
        """Return the changes that make the recipe consist of a single slice."""
        source = {"model": str(self.base), "layer_range": list(layer_range), **more}
        return {"models": DROP, "slices": [{"sources": [source]}]}

    def tokens(self, **override: Any) -> dict[str, Any]:
        """Return the change that sets an override for the token ``<x>``."""
        return {"tokenizer": {"source": str(self.donor), "tokens": {"<x>": override}}}

    def tokens_named(self, token: str) -> dict[str, Any]:
        """Return the recipe with an override for one token."""
        return self.recipe(tokenizer={"source": str(self.donor), "tokens": {token: {"source": str(self.base)}}})

    def bad_base(self, change: Callable[[Path], None]) -> dict[str, Any]:
        """Return the recipe with a modified copy of the base, ``bad``."""
        return self.recipe(models=self.models(self._copy(self.base, change)))

    def bad_donor(self, change: Callable[[Path], None]) -> dict[str, Any]:
        """Return the recipe with a modified copy of the donor, ``bad``."""
        return self.recipe(tokenizer={"source": str(self._copy(self.donor, change))})

    def _copy(self, model: Path, change: Callable[[Path], None]) -> Path:
        self.bad = self.root / f"bad{len(list(self.root.iterdir()))}"  # mergekit caches what it has read from a path
        shutil.copytree(model, self.bad)
        change(self.bad)
        return self.bad


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    return World(
        root,
        save(root / "base", make_model(base_tokenizer, seed=1), base_tokenizer),
        save(root / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=24), donor_tokenizer),
        save(root / "other", make_model(donor_tokenizer, seed=2), donor_tokenizer),
    )


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def configure(**changes: Any) -> Callable[[Path], None]:
    """Change keys of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not DROP}))

    return change


def edit(name: str, *path: str, value: Any) -> Callable[[Path], None]:
    """Set one member of a JSON file."""

    def change(folder: Path) -> None:
        holder = described = json.loads((folder / name).read_text())
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        (folder / name).write_text(json.dumps(described))

    return change


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def shard(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Make model.safetensors the one shard of an index, whose weight_map is then changed."""

    def rewrite(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        with safe_open(folder / "model-00001-of-00001.safetensors", framework="pt") as stored:
            names = dict.fromkeys(stored.keys(), "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": change(names)}))

    return rewrite


def pickle_cut_short(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": torch.zeros(100, 100)}, folder / "pytorch_model.bin")
    path = folder / "pytorch_model-00001-of-00001.bin"
    path.write_bytes((folder / "pytorch_model.bin").read_bytes()[:2000])
    (folder / "pytorch_model.bin").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": path.name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def poison(tensor: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = folder / "model.safetensors"
        data = bytearray(weights.read_bytes())
        header = int.from_bytes(data[:8], "little")
        start, end = json.loads(data[8 : 8 + header])[tensor]["data_offsets"]
        width = json.loads(data[8 : 8 + header])[tensor]["shape"][1]
        for row in (7, 300):
            at = 8 + header + start + 4 * width * row
            assert at < 8 + header + end
            data[at : at + 4] = struct.pack("<f", value)
        weights.write_bytes(data)

    return change


def both(first: Callable[[Path], None], second: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        first(folder)
        second(folder)

    return change


def flatten(tensor: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {tensor: tensors[tensor].flatten()[:8].clone()}, folder / "model.safetensors")

    return change


ABSURD = json.dumps(
    {"model.embed_tokens.weight": {"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 4 * 10**15]}}
).encode()
SLERP = {"merge_method": "omp_slerp"}

CASES: dict[str, tuple[Callable[[World], dict[str, Any]], str]] = {
    "merge_method: misspelt": (
        lambda w: w.recipe(merge_method="omp_slurp"),
        (
            "merge_method: omp_slurp is unknown (did you mean omp_slerp?); mergekit-omp has omp, "
            "omp_arcee_fusion, omp_breadcrumbs, omp_breadcrumbs_ties, omp_dare_linear, omp_dare_ties, omp_della, "
            "omp_della_linear, omp_karcher, omp_linear, omp_model_stock, omp_multislerp, omp_nearswap, "
            "omp_nuslerp, omp_passthrough, omp_ram, omp_ramplus_tl, omp_sce, omp_slerp, omp_task_arithmetic, "
            "omp_ties."
        ),
    ),
    "models: a string": (
        lambda w: w.recipe(models="x"),
        "models: 'x' is invalid; write a list, such as `- model: <name or folder>`.",
    ),
    "models: strings in the list": (
        lambda w: w.recipe(models=["x"]),
        "models[0]: 'x' is invalid; write an entry of a list, such as `- model: <name or folder>`.",
    ),
    "models: null": (
        lambda w: w.recipe(models=None),
        ("Invalid recipe: Exactly one of 'models', 'slices', or 'modules' must be present; write one of them."),
    ),
    "models: missing": (
        lambda w: w.recipe(models=DROP),
        ("Invalid recipe: Exactly one of 'models', 'slices', or 'modules' must be present; write one of them."),
    ),
    "models: beside slices": (
        lambda w: w.recipe(**(w.slices(0, 2) | {"models": w.models(w.base)})),
        ("Invalid recipe: Exactly one of 'models', 'slices', or 'modules' must be present; write one of them."),
    ),
    "models: two for omp": (
        lambda w: w.recipe(models=w.models(w.base, w.other)),
        (
            "merge_method: omp transplants one model, but the recipe names 2 ({base}, {other}); keep the "
            "base (only tokenizer.source names the donor), or merge with omp_<method>."
        ),
    ),
    "models: one twice": (
        lambda w: w.recipe(**SLERP, base_model=str(w.base), models=w.models(w.base, w.base)),
        "models[1].model: {base} is already listed as models[0]; remove one of them.",
    ),
    "models: other widths": (
        lambda w: w.recipe(**SLERP, base_model=str(w.base), models=w.models(w.base, w.donor), parameters={"t": 0.5}),
        (
            "models: {donor} has hidden size 24 and {base} has 32, but models must have the same hidden size to "
            "be merged; to give one of them the other's tokenizer, use merge_method: omp with the other as "
            "tokenizer.source."
        ),
    ),
    "models: an unknown key": (
        lambda w: w.recipe(models=w.models(w.base, weight=1)),
        "models[0].weight: is a parameter; write `parameters: {{weight: …}}`.",
    ),
    "models: no model": (
        lambda w: w.recipe(models=[{"parameters": {"k": 5}}]),
        "models[0].model: is missing; write the name or the folder of a model.",
    ),
    "models: a folder that is missing": (
        lambda w: w.recipe(models=w.models(w.root / "missing")),
        (
            "models[0].model: '{root}/missing' is neither a folder nor a model's name on the hub; write "
            "<owner>/<name> or a path."
        ),
    ),
    "models: a file": (
        lambda w: w.recipe(models=w.models(w.base / "config.json")),
        (
            "models[0].model: '{base}/config.json' is neither a folder nor a model's name on the hub; write "
            "<owner>/<name> or a path."
        ),
    ),
    "models: no name": (
        lambda w: w.recipe(models=w.models("")),
        ("models[0].model: '' is neither a folder nor a model's name on the hub; write <owner>/<name> or a path."),
    ),
    "models: two revisions": (
        lambda w: w.recipe(models=w.models("a@b@c")),
        "Invalid recipe: Invalid model path - multiple @: a@b@c; write <name>@<revision>.",
    ),
    "models: two adapters": (
        lambda w: w.recipe(models=w.models("a+b+c")),
        "Invalid recipe: Can't parse a+b+c; write <model>+<LoRA>.",
    ),
    "base_model: not among the models": (
        lambda w: w.recipe(base_model=str(w.other)),
        (
            "merge_method: omp transplants one model, but the recipe names 2 ({other}, {base}); keep the "
            "base (only tokenizer.source names the donor), or merge with omp_<method>."
        ),
    ),
    "base_model: missing": (
        lambda w: w.recipe(**SLERP, models=w.models(w.base, w.other), parameters={"t": 0.5}),
        "mergekit rejects the recipe: Merge method requires a base input for default.slices[0].",
    ),
    "slices: no sources": (
        lambda w: w.recipe(models=DROP, slices=[{"sources": []}]),
        "slices[0].sources: the list is empty; name the models of this slice.",
    ),
    "slices: layers that are not there": (
        lambda w: w.recipe(**w.slices(0, 99)),
        (
            "slices[0].sources[0].layer_range: [0, 99] is not a range of layers ({base} has 2 layers); write the "
            "first layer and the one after the last, such as [0, 2]."
        ),
    ),
    "slices: layers backwards": (
        lambda w: w.recipe(**w.slices(2, 0)),
        (
            "slices[0].sources[0].layer_range: [2, 0] is not a range of layers ({base} has 2 layers); write the "
            "first layer and the one after the last, such as [0, 2]."
        ),
    ),
    "slices: three numbers": (
        lambda w: w.recipe(**w.slices(0, 1, 2)),
        ("slices[0].sources[0].layer_range: [0, 1, 2] is invalid; write two numbers, such as [0, 12]."),
    ),
    "slices: k of a source": (
        lambda w: w.recipe(**w.slices(0, 2, parameters={"k": 0})),
        (
            "slices[0].sources[0].parameters.k: 0 is invalid: it should be greater than or equal to 1; the "
            "default is 64. (Sparsity: maximum number of anchors per new token.)"
        ),
    ),
    "a key at the top misspelt": (
        lambda w: w.recipe(tokeniser={"source": str(w.donor)}),
        (
            "tokeniser: no such key (did you mean tokenizer?); a recipe can have modules, slices, models, "
            "merge_method, base_model, dtype, tokenizer_source, tokenizer, chat_template, out_dtype, parameters."
        ),
    ),
    "a key of tokenizer: misspelt": (
        lambda w: w.recipe(tokenizer={"source": str(w.donor), "pad_to_multiple": 64}),
        (
            "tokenizer.pad_to_multiple: no such key (did you mean pad_to_multiple_of?); tokenizer can have "
            "source, tokens, pad_to_multiple_of."
        ),
    ),
    "a key of modules: misspelt": (
        lambda w: w.recipe(models=DROP, modules={"default": {"model": []}}),
        (
            "modules.default.model: no such key (did you mean models?); modules.default can have slices, models, "
            "parameters."
        ),
    ),
    "tokenizer: missing": (
        lambda w: w.recipe(tokenizer=DROP),
        (
            "tokenizer: is missing; merge_method: omp needs to know the output's tokenizer, so add, for example, "
            "`tokenizer: {{source: <the donor model>}}`."
        ),
    ),
    "tokenizer: a string": (
        lambda w: w.recipe(tokenizer=str(w.donor)),
        "tokenizer: '{donor}' is invalid; write a mapping, such as `{{source: <the donor model>}}`.",
    ),
    "tokenizer: beside tokenizer_source": (
        lambda w: w.recipe(tokenizer_source=str(w.donor)),
        (
            "Invalid recipe: Cannot specify both tokenizer_source and tokenizer; keep `tokenizer: "
            "{{source: <the donor model>}}`."
        ),
    ),
    "tokenizer.source: null": (
        lambda w: w.recipe(tokenizer={"source": None}),
        "tokenizer.source: None is invalid; write the name or the folder of a model, union or base.",
    ),
    "tokenizer.source: a folder that is missing": (
        lambda w: w.recipe(tokenizer={"source": str(w.root / "missing")}),
        (
            "tokenizer.source: '{root}/missing' is neither a folder nor a model's name on the hub; write "
            "<owner>/<name> or a path."
        ),
    ),
    "tokenizer.pad_to_multiple_of: zero": (
        lambda w: w.recipe(tokenizer={"source": str(w.donor), "pad_to_multiple_of": 0}),
        "tokenizer.pad_to_multiple_of: 0 is not a positive integer; write one such as 64.",
    ),
    "tokenizer.pad_to_multiple_of: negative": (
        lambda w: w.recipe(tokenizer={"source": str(w.donor), "pad_to_multiple_of": -8}),
        "tokenizer.pad_to_multiple_of: -8 is not a positive integer; write one such as 64.",
    ),
    "tokenizer.pad_to_multiple_of: enormous": (
        lambda w: w.recipe(tokenizer={"source": str(w.donor), "pad_to_multiple_of": 10**12}),
        "tokenizer.pad_to_multiple_of: 1000000000000 is more than 65536; write a multiple such as 64.",
    ),
    "tokenizer.pad_to_multiple_of: a word": (
        lambda w: w.recipe(tokenizer={"source": str(w.donor), "pad_to_multiple_of": "x"}),
        "tokenizer.pad_to_multiple_of: 'x' is invalid; write a positive integer, such as 64.",
    ),
    "tokenizer.tokens: a list": (
        lambda w: w.recipe(tokenizer={"source": str(w.donor), "tokens": ["<x>"]}),
        ("tokenizer.tokens: ['<x>'] is invalid; write a mapping from a token to `{{source: <an input model>}}`."),
    ),
    "tokenizer.tokens: no characters": (
        lambda w: w.recipe(tokenizer={"source": str(w.donor), "tokens": {"": {"source": str(w.base)}}}),
        "tokenizer.tokens: '' is not a token; write at least one character.",
    ),
    "tokenizer.tokens: a model that is not merged": (
        lambda w: w.recipe(**w.tokens(source=str(w.other))),
        "tokenizer.tokens['<x>'].source: {other} is not an input of the merge; its rows can come from {base}.",
    ),
    "tokenizer.tokens: a token that the model lacks": (
        lambda w: w.recipe(**w.tokens(source={"kind": "model_token", "model": str(w.base), "token": ""})),
        "tokenizer.tokens['<x>'].source: {base} has no token ''; name one that it has.",
    ),
    "tokenizer.tokens: a token to approximate that no donor has": (
        lambda w: w.recipe(**w.tokens(force=True)),
        "tokenizer.tokens['<x>']: force without a source asks to approximate the token, but {donor} has no row to "
        "approximate; name a source, such as {{kind: zero}}.",
    ),
    "tokenizer.tokens: an id that the model lacks": (
        lambda w: w.recipe(**w.tokens(source={"kind": "model_token", "model": str(w.base), "token_id": 9999})),
        "tokenizer.tokens['<x>'].source: {base} has no token 9999; name one that it has.",
    ),
    "tokenizer.tokens: a negative id": (
        lambda w: w.recipe(**w.tokens(source={"kind": "model_token", "model": str(w.base), "token_id": -1})),
        "tokenizer.tokens['<x>'].source: {base} has no token -1; name one that it has.",
    ),
    "tokenizer.tokens: a new token from its own name": (
        lambda w: w.recipe(**w.tokens(source=str(w.base))),
        "tokenizer.tokens['<x>'].source: {base} has no token '<x>'; name one that it has.",
    ),
    "tokenizer.tokens: an unknown kind": (
        lambda w: w.recipe(**w.tokens(source={"kind": "zeros"})),
        (
            "tokenizer.tokens.<x>.source.kind: 'zeros' is invalid; write the name or the folder of a "
            "model, `{{kind: zero}}`, or `{{kind: model_token, model: <name or folder>, token: <its token>}}`."
        ),
    ),
    "tokenizer.tokens: an unknown key": (
        lambda w: w.recipe(**w.tokens(sauce=str(w.base))),
        (
            "tokenizer.tokens.<x>.sauce: no such key (did you mean source?); tokenizer.tokens.<x> can have "
            "source, force."
        ),
    ),
    "former keys: an option of the command": (
        lambda w: w.recipe(random_seed=0),
        (
            "random_seed: is an option of mergekit's commands, not a key of a recipe; leave it out and write "
            "--random-seed there."
        ),
    ),
    "former keys: a mixture of experts": (
        lambda w: w.recipe(gate_mode="hidden"),
        (
            "gate_mode: is a key of mergekit-moe; give the experts one tokenizer with merge_method: omp first, and "
            "name the results there."
        ),
    ),
    "former keys: bakllama": (
        lambda w: w.recipe(layer_slices=[]),
        "layer_slices: is a key of mergekit's former bakllama; write `slices:`.",
    ),
    "former keys: embed_slerp": (
        lambda w: w.recipe(parameters={"embed_slerp": True}),
        (
            "parameters.embed_slerp is not a parameter of omp; leave it out: the merge method itself merges "
            "embeddings since mergekit 0.0.5, by slerp in omp_slerp."
        ),
    ),
    "former keys: int8_mask": (
        lambda w: w.recipe(**SLERP, parameters={"int8_mask": True}),
        (
            "parameters.int8_mask is not a parameter of omp_slerp; leave it out: it saves memory in methods that have "
            "masks, and changes no result."
        ),
    ),
    "former keys: tokenizer_source with model:": (
        lambda w: w.recipe(tokenizer=DROP, tokenizer_source="model:some/donor"),
        "tokenizer_source: 'model:some/donor' is written without 'model:' now: some/donor.",
    ),
    "former keys: the source with model:": (
        lambda w: w.recipe(tokenizer={"source": "model:some/donor"}),
        "tokenizer.source: 'model:some/donor' is written without 'model:' now: some/donor.",
    ),
    "a parameter at the top": (
        lambda w: w.recipe(k=8),
        "k: is a parameter; write `parameters: {{k: …}}`.",
    ),
    "parameters: a list": (
        lambda w: w.recipe(parameters=[1]),
        "parameters: [1] is invalid; write a mapping, such as `{{k: 64}}`.",
    ),
    "parameters: an unknown name": (
        lambda w: w.recipe(parameters={"K": 5}),
        "parameters.K is not a parameter of omp (did you mean k?); it has scale, {parameters}.",
    ),
    "parameters: one of an earlier version": (
        lambda w: w.recipe(parameters={"k": 5, "scan_every": 8}),
        "parameters.scan_every was removed: every solve is exact now, and about as fast; leave it out.",
    ),
    "parameters: one that the inner method needs": (
        lambda w: w.recipe(**SLERP, base_model=str(w.other), models=w.models(w.other, w.base)),
        "mergekit rejects the recipe: Missing required parameter t for model.embed_tokens.weight.",
    ),
    "k: null": (
        lambda w: w.recipe(parameters={"k": None}),
        (
            "parameters.k: None is invalid; write a value, or a list of filters such as `- {{filter: "
            "lm_head, value: 64}}`."
        ),
    ),
    "k: a mapping": (
        lambda w: w.recipe(parameters={"k": {"a": 1}}),
        "parameters.k.a: no such key; parameters.k can have value, filter.",
    ),
    "k: zero": (
        lambda w: w.recipe(parameters={"k": 0}),
        (
            "parameters.k: 0 is invalid: it should be greater than or equal to 1; the default is 64. "
            "(Sparsity: maximum number of anchors per new token.)"
        ),
    ),
    "k: negative": (
        lambda w: w.recipe(parameters={"k": -3}),
        (
            "parameters.k: -3 is invalid: it should be greater than or equal to 1; the default is 64. "
            "(Sparsity: maximum number of anchors per new token.)"
        ),
    ),
    "k: a fraction": (
        lambda w: w.recipe(parameters={"k": 3.5}),
        (
            "parameters.k: 3.5 is invalid: it should be a valid integer; the default is 64. "
            "(Sparsity: maximum number of anchors per new token.)"
        ),
    ),
    "k: in quotes": (
        lambda w: w.recipe(parameters={"k": "64"}),
        (
            "parameters.k: '64' is invalid: it should be a valid integer; the default is 64. "
            "(Sparsity: maximum number of anchors per new token.)"
        ),
    ),
    "k: true": (
        lambda w: w.recipe(parameters={"k": True}),
        (
            "parameters.k: True is invalid: it should be a valid integer; the default is 64. "
            "(Sparsity: maximum number of anchors per new token.)"
        ),
    ),
    "k: of one model": (
        lambda w: w.recipe(models=w.models(w.base, parameters={"k": 0})),
        (
            "models[0].parameters.k: 0 is invalid: it should be greater than or equal to 1; the default is "
            "64. (Sparsity: maximum number of anchors per new token.)"
        ),
    ),
    "k: a gradient": (
        lambda w: w.recipe(parameters={"k": [1, 2]}),
        (
            "parameters.k: [1, 2] is a gradient over layers, but vocabulary tensors belong to no layer; write one"
            " value, or a list of filters."
        ),
    ),
    "k: an empty list": (
        lambda w: w.recipe(parameters={"k": []}),
        "parameters.k: the list is empty; write one value, or a list of filters.",
    ),
    "k: a bad value under a filter": (
        lambda w: w.recipe(parameters={"k": [{"filter": "lm_head", "value": 0}, {"value": 3}]}),
        (
            "parameters.k: 0 is invalid: it should be greater than or equal to 1; the default is 64. "
            "(Sparsity: maximum number of anchors per new token.)"
        ),
    ),
    "k: a gradient under a filter": (
        lambda w: w.recipe(parameters={"k": [{"filter": "lm_head", "value": [3, 4]}, {"value": 3}]}),
        (
            "parameters.k: [3, 4] is a gradient over layers, but vocabulary tensors belong to no layer; write one"
            " value, or a list of filters."
        ),
    ),
    "k: values among filters": (
        lambda w: w.recipe(parameters={"k": [{"filter": "lm_head", "value": 3}, 4]}),
        (
            "parameters.k: [{{'filter': 'lm_head', 'value': 3}}, 4] is invalid; write a value, or a "
            "list of filters such as `- {{filter: lm_head, value: 64}}`."
        ),
    ),
    "normalize_atoms: a word": (
        lambda w: w.recipe(parameters={"normalize_atoms": "sometimes"}),
        (
            "parameters.normalize_atoms: 'sometimes' is invalid: it should be a valid boolean; the default "
            "is False. (Select anchors by their cosine with the residual instead of the inner product.)"
        ),
    ),
    "new_vocab_noise: negative": (
        lambda w: w.recipe(parameters={"new_vocab_noise": -0.1}),
        (
            "parameters.new_vocab_noise: -0.1 is invalid: it should be greater than or equal to 0; the "
            "default is 0.0. (Standard deviation of Gaussian noise added to approximated rows.)"
        ),
    ),
    "new_vocab_scale: not a number": (
        lambda w: w.recipe(parameters={"new_vocab_scale": float("nan")}),
        (
            "parameters.new_vocab_scale: nan is invalid: it should be a finite number; the default is 1.0. "
            "(Factor by which approximated rows are scaled.)"
        ),
    ),
    "t: a word": (
        lambda w: w.recipe(**SLERP, base_model=str(w.base), models=w.models(w.base), parameters={"t": "much"}),
        (
            "parameters.t: 'much' is invalid: it should be a valid number, unable to parse string as a number; write "
            "another value."
        ),
    ),
    "t: not a number": (
        lambda w: w.recipe(
            **SLERP, base_model=str(w.base), models=w.models(w.base), parameters={"t": [0.5, float("nan")]}
        ),
        "parameters.t: nan is invalid: it should be a finite number; write another value.",
    ),
    "an alias inside its own value": (
        lambda w: w.recipe(models=(loop := []) or loop.append(loop) or loop),
        "models[0]: contains itself by a YAML alias; write a value without the alias.",
    ),
    "a text that is not Unicode": (
        lambda w: w.tokens_named("\ud800"),
        "tokenizer.tokens: '\\ud800' has half of a surrogate pair; rewrite it.",
    ),
    "dtype: unknown": (
        lambda w: w.recipe(dtype="float12"),
        "dtype: float12 is not a type that mergekit supports; write bfloat16, float16 or float32.",
    ),
    "dtype: a number": (
        lambda w: w.recipe(dtype=16),
        "dtype: 16 is invalid; write a type such as bfloat16.",
    ),
    "dtype: of integers": (
        lambda w: w.recipe(dtype="int64"),
        "dtype: int64 is not a floating point type; write bfloat16, float16 or float32.",
    ),
    "out_dtype: unknown": (
        lambda w: w.recipe(out_dtype="fp8"),
        "out_dtype: fp8 is not a type that mergekit supports; write bfloat16, float16 or float32.",
    ),
    "chat_template: misspelt": (
        lambda w: w.recipe(chat_template="chatmm"),
        (
            "chat_template: unknown template 'chatmm' (did you mean chatml?); write auto, alpaca, chatml, exaone, "
            "llama3, mistral, or a Jinja template."
        ),
    ),
    "chat_template: no Jinja": (
        lambda w: w.recipe(chat_template="{% for message in messages %}{{ message }}{% end %}"),
        (
            "chat_template: invalid Jinja in line 1 of the template: Encountered unknown tag 'end'. Jinja was looking "
            "for the following tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'."
        ),
    ),
    "chat_template: too short": (
        lambda w: w.recipe(chat_template="{{ messages }}"),
        "chat_template: '{{{{ messages }}}}' is too short; mergekit requires at least 20 characters.",
    ),
    "config.json: missing": (
        lambda w: w.bad_base(remove("config.json")),
        "models[0].model: {bad} has no config.json; name a model that has one.",
    ),
    "config.json: no JSON": (
        lambda w: w.bad_base(write("config.json", "{")),
        (
            "models[0].model: config.json of {bad} cannot be read (It looks like the config file at "
            "'{bad}/config.json' is not a valid JSON file); download the model again."
        ),
    ),
    "config.json: an unknown type of model": (
        lambda w: w.bad_base(configure(model_type="zzz")),
        (
            "models[0].model: config.json of {bad} cannot be read (The checkpoint you are trying to load has "
            "model type `zzz` but Transformers does not recognize this architecture. This could be because of an "
            "issue with the checkpoint, or because your version of Transformers is out of date); download the "
            "model again."
        ),
    ),
    "config.json: no architecture": (
        lambda w: w.bad_base(configure(architectures=DROP)),
        (
            "models[0].model: architectures in config.json of {bad} is None; mergekit needs exactly one, such as "
            '["LlamaForCausalLM"].'
        ),
    ),
    "config.json: two architectures": (
        lambda w: w.bad_base(configure(architectures=["A", "B"])),
        (
            "models[0].model: architectures in config.json of {bad} is ['A', 'B']; mergekit needs exactly one, "
            'such as ["LlamaForCausalLM"].'
        ),
    ),
    "config.json: a word for vocab_size": (
        lambda w: w.bad_base(configure(vocab_size="many")),
        (
            "models[0].model: config.json of {bad} cannot be read (Validation error for field 'vocab_size': "
            "TypeError: Field 'vocab_size' expected int, got str (value: 'many')); download the model again."
            if has("5.5")
            else "models[0].model: vocab_size in config.json of {bad} is 'many'; download the model again."
        ),
    ),
    "config.json: a negative vocab_size": (
        lambda w: w.bad_base(configure(vocab_size=-5)),
        "models[0].model: vocab_size in config.json of {bad} is -5; download the model again.",
    ),
    "config.json: a vocab_size above the rows": (
        lambda w: w.bad_base(both(configure(vocab_size=10**12), cut_rows)),
        (
            "lm_head.weight of {bad} has 100 rows, but its config.json promises at least 484: set vocab_size "
            "there to the rows that the checkpoint has."
        ),
    ),
    "config.json: a vocab_size above the rows, and a test of them": (
        lambda w: w.bad_base(cut_rows) | {"parameters": {"k": 5, "magikarp": True}},
        (
            "model.embed_tokens.weight of {bad} has 100 rows, but its config.json promises at least 493: set "
            "vocab_size there to the rows that the checkpoint has."
        ),
    ),
    "config.json: a vocab_size above the rows of the donor, and a test of them": (
        lambda w: w.bad_donor(cut_rows) | {"parameters": {"k": 5, "magikarp": True}},
        (
            "model.embed_tokens.weight of {bad} has 100 rows, but its config.json promises at least 376: set "
            "vocab_size there to the rows that the checkpoint has."
        ),
    ),
    "config.json: a vocab_size above the rows, and a check of new rows": (
        lambda w: w.bad_base(cut_rows) | {"parameters": {"k": 5, "unsafe_tokens": "mean"}},
        (
            "model.embed_tokens.weight of {bad} has 100 rows, but its config.json promises at least 484: set "
            "vocab_size there to the rows that the checkpoint has."
        ),
    ),
    "config.json: a vocab_size below the rows": (
        lambda w: w.bad_base(configure(vocab_size=300)),
        (
            "models[0].model: config.json of {bad} says vocab_size 300, but its tokenizer has 493 tokens and its "
            "embedding 493 rows; set vocab_size there to 493."
        ),
    ),
    "config.json: a vocab_size below the rows of the donor": (
        lambda w: w.bad_donor(configure(vocab_size=300)),
        (
            "tokenizer.source: config.json of {bad} says vocab_size 300, but its tokenizer has 376 tokens and its "
            "embedding 376 rows; set vocab_size there to 376."
        ),
    ),
    "config.json: a billion layers": (
        lambda w: w.bad_base(configure(num_hidden_layers=10**9, layer_types=DROP)),
        (
            "models[0].model: config.json of {bad} cannot be read (num_hidden_layers is 1000000000, and no model has "
            "more than 10000); download the model again."
        ),
    ),
    "config.json: a thousand layers": (
        lambda w: w.bad_base(configure(num_hidden_layers=1000, layer_types=DROP)),
        (
            "models[0].model: config.json of {bad} declares 1000 layers, but its checkpoint has 21 tensors in all; "
            "download the model again."
        ),
    ),
    "config.json: one layer too many": (
        lambda w: w.bad_base(configure(num_hidden_layers=3, layer_types=DROP)),
        (
            "mergekit rejects the recipe: Tensor model.layers.2.input_layernorm.weight required but not present "
            "in model {bad}."
        ),
    ),
    "tokenizer.json: no JSON": (
        lambda w: w.bad_base(write("tokenizer.json", "nope")),
        (
            "models[0].model: cannot read a tokenizer from {bad} (Expecting value: line 1 column 1 (char 0)); "
            "name a model with a tokenizer."
        ),
    ),
    "tokenizer.json: an empty mapping": (
        lambda w: w.bad_base(write("tokenizer.json", "{}")),
        (
            "models[0].model: cannot read a tokenizer from {bad} (the key 'added_tokens' is missing); name a model "
            "with a tokenizer."
        ),
    ),
    "tokenizer.json: of the donor, a page of an error": (
        lambda w: w.bad_donor(write("tokenizer.json", "<html>404")),
        (
            "tokenizer.source: cannot read a tokenizer from {bad} (Expecting value: line 1 column 1 (char 0)); "
            "name a model with a tokenizer."
        ),
    ),
    "tokenizer.json: of the donor, missing": (
        lambda w: w.bad_donor(remove("tokenizer.json", "tokenizer_config.json")),
        (
            "tokenizer.source: cannot read a tokenizer from {bad} (the folder has no tokenizer.json, tokenizer.model "
            "or tekken.json); name a model with a tokenizer."
        ),
    ),
    "tokenizer.json: an id of four billion": (
        lambda w: w.bad_donor(edit("tokenizer.json", "model", "vocab", "Ġthe", value=2**32 - 1)),
        (
            "The tokenizer '{bad}' has 376 tokens, but gives 'Ġthe' the id 4294967295, so that an embedding would "
            "need as many rows; download the tokenizer again."
        ),
    ),
    "tokenizer.json: two tokens with one id": (
        lambda w: w.bad_donor(edit("tokenizer.json", "model", "vocab", "Ġthe", value=7)),
        "The tokenizer '{bad}' gives \"'\" and 'Ġthe' the same id, 7; download the tokenizer again.",
    ),
    "tokenizer.json: an added token with the id of another": (
        lambda w: w.bad_donor(edit("tokenizer.json", "model", "vocab", "Ġthe", value=0)),
        "The tokenizer '{bad}' gives '<|endoftext|>' and 'Ġthe' the same id, 0; download the tokenizer again.",
    ),
    "tokenizer.json: merges on which tokenizers ends the process": (
        lambda w: w.bad_base(edit("tokenizer.json", "model", "continuing_subword_prefix", value="@" * 9)),
        (
            "models[0].model: cannot read a tokenizer from {bad} (the merge ['e', 'r'] does not continue a word, "
            "which '@@@@@@@@@' would begin); name a model with a tokenizer."
        ),
    ),
    "tokenizer.json: a tower of brackets": (
        lambda w: w.bad_base(write("tokenizer.json", "[" * 10**5)),
        (
            "models[0].model: cannot read a tokenizer from {bad} (maximum recursion depth exceeded while decoding a "
            "JSON array from a unicode string); name a model with a tokenizer."
        ),
    ),
    "tokenizer_config.json: a number for the chat template": (
        lambda w: w.bad_donor(edit("tokenizer_config.json", "chat_template", value=5)),
        (
            "tokenizer.source: cannot read a tokenizer from {bad} (its chat_template is 5, not text); name a model "
            "with a tokenizer."
        ),
    ),
    "tokenizer_config.json: a word for the longest text": (
        lambda w: w.bad_donor(edit("tokenizer_config.json", "model_max_length", value="long")),
        (
            "tokenizer.source: cannot read a tokenizer from {bad} (its model_max_length is 'long', not a number); "
            "name a model with a tokenizer."
        ),
    ),
    "config.json: of a donor of an unknown type, half a row": (
        lambda w: w.bad_donor(configure(model_type="zzz", hidden_size=0.5)),
        "tokenizer.source: hidden_size in config.json of {bad} is 0.5; download the model again.",
    ),
    "config.json: of the donor, a trillion rows": (
        lambda w: w.bad_donor(configure(vocab_size=10**12)),
        (
            "tokenizer.source: vocab_size in its config.json is 1000000000000, but its tokenizer has 376 tokens; "
            "download the model again."
        ),
    ),
    "config.json: a number for the architecture": (
        lambda w: w.bad_donor(configure(model_type="zzz", architectures=[1])),
        (
            "tokenizer.source: architectures in config.json of {bad} is [1]; mergekit needs exactly one, such as "
            '["LlamaForCausalLM"].'
        ),
    ),
    "config.json: of an unknown architecture, a word for a number": (
        lambda w: w.bad_base(
            configure(architectures=["Zzz"], rope_parameters={"rope_theta": "silu", "rope_type": "default"})
        ),
        (
            "models[0].model: mergekit finds no vocabulary matrix in {bad}, because it has no data on its "
            "architecture and transformers cannot build the model from its config.json; download the model again."
        ),
    ),
    "weights: missing": (
        lambda w: w.bad_base(remove("model.safetensors")),
        (
            "models[0].model: {bad} has no weights, neither model.safetensors nor pytorch_model.bin, as a single file "
            "or in shards; name a model that has weights."
        ),
    ),
    "weights: of the donor, missing": (
        lambda w: w.bad_donor(remove("model.safetensors")),
        (
            "tokenizer.source: {bad} has a tokenizer but no weights that mergekit can read (Unable to find model "
            "files at {bad}); OMP needs embeddings of new tokens, so name a model that has both, or write an "
            "approximation that needs no weights, such as subword."
        ),
    ),
    "weights: of the donor, missing, for a base that is not listed": (
        lambda w: (
            w.bad_donor(remove("config.json", "model.safetensors"))
            | {"merge_method": "omp_task_arithmetic", "base_model": str(w.base)}
            | {"models": w.models(w.other, parameters={"approximation": "subword"}), "parameters": {}}
        ),
        (
            "tokenizer.source: {bad} is a tokenizer without a model, and approximation: omp needs embeddings of new "
            "tokens; name a model that has both, or write, under parameters: of the recipe, approximation: subword or "
            "mean or zero or randn or john_hewitt or focus or wechsel or zett or tokalign, without magikarp."
        ),
    ),
    "weights: of the donor, without rows": (
        lambda w: w.bad_donor(flatten(HEAD)),
        "tokenizer.source: lm_head.weight of {bad} has the shape [8], no rows; download the model again.",
    ),
    "weights: truncated": (
        lambda w: w.bad_base(truncate),
        (
            "models[0].model: {bad}/model.safetensors cannot be read (Error while deserializing header: "
            "incomplete metadata, file not fully covered); download the model again."
        ),
    ),
    "weights: of the donor, truncated": (
        lambda w: w.bad_donor(truncate),
        (
            "tokenizer.source: {bad}/model.safetensors cannot be read (Error while deserializing header: "
            "incomplete metadata, file not fully covered); download the model again."
        ),
    ),
    "weights: a download cut short": (
        lambda w: w.bad_base(write("model.safetensors", b"")),
        (
            "models[0].model: {bad}/model.safetensors cannot be read (Error while deserializing header: header "
            "too small); download the model again."
        ),
    ),
    "weights: a page of an error": (
        lambda w: w.bad_base(write("model.safetensors", "<html>404 not found</html>")),
        (
            "models[0].model: {bad}/model.safetensors cannot be read (Error while deserializing header: header "
            "too large); download the model again."
        ),
    ),
    "weights: absurd shapes": (
        lambda w: w.bad_base(write("model.safetensors", struct.pack("<Q", len(ABSURD)) + ABSURD)),
        (
            "models[0].model: {bad}/model.safetensors cannot be read (Error while deserializing header: "
            "incomplete metadata, file not fully covered); download the model again."
        ),
    ),
    "weights: of the donor, a pickle cut short": (
        lambda w: w.bad_donor(pickle_cut_short),
        (
            "tokenizer.source: {bad}/pytorch_model-00001-of-00001.bin cannot be read (it is truncated); download "
            "the model again."
        ),
    ),
    "weights: a tensor missing": (
        lambda w: w.bad_base(shard(lambda names: {n: s for n, s in names.items() if "layers.1.mlp.up" not in n})),
        (
            "mergekit rejects the recipe: Tensor model.layers.1.mlp.up_proj.weight required but not present in "
            "model {bad}."
        ),
    ),
    "weights: NaN": (
        lambda w: w.bad_base(poison("model.embed_tokens.weight", float("nan"))),
        (
            "model.embed_tokens.weight of {bad} holds NaN or infinite values in 2 rows (first: 7, 300); repair "
            "the checkpoint."
        ),
    ),
    "weights: infinity in the donor": (
        lambda w: w.bad_donor(poison("model.embed_tokens.weight", float("inf"))),
        (
            "model.embed_tokens.weight of {bad} holds NaN or infinite values in 2 rows (first: 7, 300); repair "
            "the checkpoint."
        ),
    ),
    "index.json: names a missing shard": (
        lambda w: w.bad_base(shard(lambda names: names | {"lm_head.weight": "model-00002-of-00002.safetensors"})),
        ("models[0].model: the shard {bad}/model-00002-of-00002.safetensors is missing; download the model again."),
    ),
    "index.json: of the donor, names a missing shard": (
        lambda w: w.bad_donor(shard(lambda names: names | {"lm_head.weight": "model-00002.safetensors"})),
        "tokenizer.source: the shard {bad}/model-00002.safetensors is missing; download the model again.",
    ),
    "index.json: leaves the folder": (
        lambda w: w.bad_base(shard(lambda names: names | {"lm_head.weight": "../other/model.safetensors"})),
        (
            "models[0].model: {bad}/model.safetensors.index.json names the shard '../other/model.safetensors', "
            "which is not a file in the model's folder; do not use this model unless you know why."
        ),
    ),
    "index.json: leaves the folder on Windows": (
        lambda w: w.bad_donor(shard(lambda names: names | {"lm_head.weight": "..\\other\\model.safetensors"})),
        (
            "tokenizer.source: {bad}/model.safetensors.index.json names the shard '..\\\\other\\\\model.safetensors',"
            " which is not a file in the model's folder; do not use this model unless you know why."
        ),
    ),
    "index.json: an absolute path": (
        lambda w: w.bad_donor(shard(lambda names: names | {"lm_head.weight": "/etc/passwd"})),
        (
            "tokenizer.source: {bad}/model.safetensors.index.json names the shard '/etc/passwd', which is not a file"
            " in the model's folder; do not use this model unless you know why."
        ),
    ),
    "index.json: no name": (
        lambda w: w.bad_base(shard(lambda names: names | {"lm_head.weight": 3})),
        (
            "models[0].model: {bad}/model.safetensors.index.json names the shard 3, which is not a file in the "
            "model's folder; do not use this model unless you know why."
        ),
    ),
    "index.json: a list": (
        lambda w: w.bad_base(shard(list)),
        (
            "models[0].model: {bad}/model.safetensors.index.json is not an index of weights ('list' object has no"
            " attribute 'items'); download the model again."
        ),
    ),
    "index.json: a name of three thousand letters": (
        lambda w: w.bad_base(shard(lambda names: names | {"lm_head.weight": "x" * 3000})),
        (
            "models[0].model: {bad}/model.safetensors.index.json names the shard '" + "x" * 199 + "… which is not a "
            "file in the model's folder; do not use this model unless you know why."
        ),
    ),
    "index.json: names nothing": (
        lambda w: w.bad_base(shard(lambda names: {})),
        "models[0].model: {bad}/model.safetensors.index.json names no tensors; download the model again.",
    ),
    "index.json: a tensor that its shard lacks": (
        lambda w: w.bad_base(shard(lambda names: names | {"x.weight": "model-00001-of-00001.safetensors"})),
        (
            "models[0].model: {bad}/model.safetensors.index.json says that model-00001-of-00001.safetensors holds "
            "x.weight, which it does not; download the model again."
        ),
    ),
    "index.json: no JSON": (
        lambda w: w.bad_base(both(shard(dict), write("model.safetensors.index.json", "{"))),
        (
            "models[0].model: {bad}/model.safetensors.index.json is not an index of weights (Expecting property "
            "name enclosed in double quotes: line 1 column 2 (char 1)); download the model again."
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sentence(world: World, tmp_path: Path, name: str) -> None:
    make, sentence = CASES[name]
    recipe = make(world)
    folders = {"base": world.base, "donor": world.donor, "other": world.other, "root": world.root, "bad": world.bad}
    expected = sentence.format(parameters=", ".join(OmpParameters.model_fields), **folders)
    assert refusal(recipe, tmp_path / "out", "--quiet") == expected


@pytest.mark.parametrize("name", ["k: zero", "models: a string", "weights: truncated"])
def test_sentence_of_the_installed_command(world: World, tmp_path: Path, name: str) -> None:
    """Check that the installed command prints the message that the table asserts in this process."""
    make, sentence = CASES[name]
    recipe = make(world)
    assert refused(recipe, tmp_path / "out") == sentence.format(base=world.base, bad=world.bad)


def test_the_recipe_that_the_table_changes_works(world: World, tmp_path: Path) -> None:
    """Check the unmodified recipe: otherwise every case could fail for another reason."""
    result = merge_here(world.recipe(), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output


def test_name_of_the_recipe_is_accepted(world: World, tmp_path: Path) -> None:
    assert merge_here(world.recipe(name="mine"), tmp_path / "out", "--quiet").exit_code == 0
