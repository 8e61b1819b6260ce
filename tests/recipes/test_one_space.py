"""Test merges of fine-tunes of one base: a token that only some of them have keeps its row, as in mergekit."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    run,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from tokenizers import Tokenizer
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import mergekit_omp
from mergekit_omp.cli.inspect import inspect
from mergekit_omp.realign.space import similarity
from mergekit_omp.report.record import Origin, read_record, unpack_rows

mergekit_omp.register()

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TURNS = ("<|im_start|>", "<|im_end|>")
NEED_A_BASE = ("ties", "dare_ties", "dare_linear", "task_arithmetic", "slerp", "breadcrumbs", "della")


def fine_tune(model: PreTrainedModel, seed: int, noise: float) -> PreTrainedModel:
    """Change every weight of a model a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            moved = torch.randn(parameter.shape, generator=generator) * parameter.float().std().nan_to_num(0.0)
            parameter += noise * moved.to(parameter.dtype)
    return model


def write(
    folder: Path,
    base: Path,
    tokens: tuple[str, ...],
    seed: int,
    noise: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a fine-tune of ``base`` with added tokens, whose rows are unlike all others."""
    model = fine_tune(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), seed, noise)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
            new = torch.randn(len(tokenizer) - rows, matrix.weight.shape[1], generator=generator)
            matrix.weight[rows:] = 0.02 * new.to(dtype)
    return save(folder, model, tokenizer)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a base, fine-tunes of it with and without added tokens, and a model of another family of equal width."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_level_tokenizer(ENGLISH, size=400)
    base = save(folder / "base", make_model(tokenizer), tokenizer)
    other = sentencepiece_tokenizer(PYTHON, size=400)
    return {
        "base": base,
        "plain": write(folder / "plain", base, (), 1),
        "chat": write(folder / "chat", base, TURNS, 2),
        "chat2": write(folder / "chat2", base, TURNS, 3),
        "tool": write(folder / "tool", base, ("<|tool|>",), 4),
        "other": save(folder / "other", make_model(other, seed=9), other),
    }


def recipe(method: str, inputs: list[Path], source: Path | str, **more: Any) -> dict[str, Any]:
    settings = {"k": 5, **more.pop("parameters", {})} if method.startswith("omp") else {}
    needs = {"slerp": {"t": 0.5}, "passthrough": {}}.get(method.removeprefix("omp_").replace("omp", "passthrough"))
    made = {
        "merge_method": method,
        "models": [{"model": str(path)} for path in inputs],
        "tokenizer": {"source": str(source)},
        "parameters": {**({"weight": 0.5} if needs is None else needs), **settings},
        "dtype": "float32",
        **more,
    }
    if method.removeprefix("omp_") in NEED_A_BASE:
        made["base_model"] = str(inputs[0])
    return made


def rows_of(folder: Path, tensors: dict[str, torch.Tensor], name: str, tokens: tuple[str, ...]) -> torch.Tensor:
    return tensors[name][AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(tokens))]


def both(
    folder: Path, outputs: dict[str, dict[str, torch.Tensor]], name: str, tokens: tuple[str, ...]
) -> list[torch.Tensor]:
    return [rows_of(folder / out, tensors, name, tokens) for out, tensors in outputs.items()]


@pytest.mark.parametrize("source", ["union", "base", "chat"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp", "task_arithmetic", "passthrough"])
def test_rows_are_as_mergekit_has_them(method: str, source: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Compare every tensor bit for bit with a merge by mergekit's own method and tokenizer."""
    inputs = [models["plain"], models["chat"]]
    if method == "passthrough":
        inputs = inputs[:1] if source != "chat" else inputs[1:]
    if source == "base":
        inputs = inputs[::-1]  # the base has the tokens
    named = str(models["chat"]) if source == "chat" else source
    more = {"base_model": str(inputs[0])} if source == "base" else {}
    expected = run(recipe(method, inputs, named, **more), tmp_path / "expected")
    result = run(recipe(f"omp_{method}", inputs, named, **more), tmp_path / "result")
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        if name not in (EMBED, HEAD):
            assert torch.equal(result[name], tensor), name
            continue
        tokens = tuple(AutoTokenizer.from_pretrained(tmp_path / "result").get_vocab())
        ours, its = (
            rows_of(tmp_path / out, made, name, tokens) for out, made in (("result", result), ("expected", expected))
        )
        assert torch.equal(ours, its), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp", "task_arithmetic"])
@pytest.mark.parametrize("source", ["union", "chat"])
def test_a_token_of_one_input_keeps_its_row(
    source: str, method: str, dtype: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Check bit for bit, also if the base lacks the token, and for any seed."""
    inputs = [models["plain"], models["chat"]]
    named = str(models["chat"]) if source == "chat" else source
    own = tensors_of(models["chat"])
    for seed in (1, 2):
        out = tmp_path / f"out{seed}"
        result = run(recipe(f"omp_{method}", inputs, named, dtype=dtype), out, random_seed=seed)
        for name in (EMBED, HEAD):
            kept = rows_of(models["chat"], own, name, TURNS).to(getattr(torch, dtype))
            assert torch.equal(rows_of(out, result, name, TURNS), kept), (name, seed)
    assert read_record(out)["solves"] == []


def test_slerp_of_distant_inputs_scales_as_mergekits(models: dict[str, Path], tmp_path: Path) -> None:
    """Check equal rows, which slerp of whole matrices scales by 1 / cos(θ / 2) beyond a small angle θ."""
    far = write(tmp_path / "far", models["base"], TURNS, 5, noise=0.5)
    inputs = [models["plain"], far]
    expected = run(recipe("slerp", inputs, "union"), tmp_path / "expected")
    result = run(recipe("omp_slerp", inputs, "union"), tmp_path / "result")
    ours = rows_of(tmp_path / "result", result, EMBED, TURNS)
    assert torch.equal(ours, rows_of(tmp_path / "expected", expected, EMBED, TURNS))
    kept = rows_of(far, tensors_of(far), EMBED, TURNS)
    ratio = ours / kept
    assert float(ratio.min()) > 1.001
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_several_that_have_a_token_give_the_mean_or_the_bases_row(models: dict[str, Path], tmp_path: Path) -> None:
    """Check the base's row if the base has the token, else the mean of the models that have it, as in mergekit."""
    inputs = [models["plain"], models["chat"], models["chat2"]]
    merged = run(recipe("omp_ties", inputs, "union"), tmp_path / "ties")
    plain = run(recipe("ties", inputs, "union"), tmp_path / "plain")
    for name in (EMBED, HEAD):
        ours, its = (rows_of(tmp_path / out, made, name, TURNS) for out, made in (("ties", merged), ("plain", plain)))
        assert torch.equal(ours, its)
    based = recipe("omp_linear", inputs[::-1], "union", base_model=str(models["chat2"]))
    result = run(based, tmp_path / "based")
    expected = run({**based, "merge_method": "linear", "parameters": {"weight": 0.5}}, tmp_path / "expected")
    for name in (EMBED, HEAD):
        ours, its = both(tmp_path, {"based": result, "expected": expected}, name, TURNS)
        assert torch.equal(ours, its)


def test_a_donor_that_is_not_merged(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that rows come from a newer fine-tune as the source, and that nothing is approximated."""
    inputs = [models["base"], models["plain"]]
    result = run(recipe("omp_linear", inputs, models["chat"]), tmp_path / "linear")
    own = tensors_of(models["chat"])
    alone = run(recipe("omp", [models["base"]], models["chat"]), tmp_path / "alone")
    for name in (EMBED, HEAD):
        kept = rows_of(models["chat"], own, name, TURNS)
        assert torch.equal(rows_of(tmp_path / "linear", result, name, TURNS), kept)
        assert torch.equal(rows_of(tmp_path / "alone", alone, name, TURNS), kept)
        assert torch.equal(alone[name][:-2], tensors_of(models["base"])[name])
    record = read_record(tmp_path / "alone")
    assert record["tensors"][0]["copied"] == [{"from": [str(models["chat"])], "tokens": 2}]
    origins = unpack_rows(record["models"][0]["origins"]).tolist()
    assert origins == [*range(len(origins) - 2), Origin.COPIED, Origin.COPIED]


def test_inputs_of_another_space_are_approximated(models: dict[str, Path], tmp_path: Path) -> None:
    """Check two families in one merge: copies within one of them, approximation for the other."""
    inputs = [models["plain"], models["chat"], models["other"]]
    union = recipe("omp_linear", inputs, "union", base_model=str(models["plain"]))
    run(union, tmp_path / "out")
    record = read_record(tmp_path / "out")
    copied = {(tensor["name"], tensor["model"]): tensor["copied"] for tensor in record["tensors"]}
    for name in (EMBED, HEAD):
        assert copied[name, str(models["plain"])] == [{"from": [str(models["chat"])], "tokens": 2}]
        assert copied[name, str(models["other"])] == []
    targets = {(solve["base"], solve["donor"]): solve["targets"] for solve in record["solves"]}
    assert targets[str(models["other"]), str(models["chat"])] == 2
    assert (str(models["plain"]), str(models["chat"])) not in targets


def test_a_row_of_the_same_role_is_not_copied(models: dict[str, Path], tmp_path: Path) -> None:
    """Check a fine-tune with another end of text: the base's is not averaged into it."""
    chat = tmp_path / "chatml"
    write(chat, models["base"], TURNS, 7)
    path = chat / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}))
    result = run(recipe("omp_linear", [models["base"], chat], chat), tmp_path / "out")
    own, before = tensors_of(chat), tensors_of(models["base"])
    for name in (EMBED, HEAD):
        assert torch.equal(rows_of(tmp_path / "out", result, name, TURNS), rows_of(chat, own, name, TURNS))
        end = rows_of(tmp_path / "out", result, name, ("<|endoftext|>",))
        torch.testing.assert_close(end, (own[name][:1] + before[name][:1]) / 2)


def test_renamed_special_tokens_pair(tmp_path: Path) -> None:
    """Check DeepSeek-R1-Distill-Qwen and Qwen: tokens with the same id and role are averaged.

    Tokens of the same id without a role (``<｜User｜>``) exist in the fine-tune only, and keep its row.
    """
    names = {
        "<|endoftext|>": "<｜end▁of▁sentence｜>",
        "<|object_ref_start|>": "<｜begin▁of▁sentence｜>",
        "<|box_start|>": "<｜User｜>",
    }
    end, begin, user = names.values()
    tokenizer = byte_level_tokenizer(ENGLISH, size=400, special=tuple(names)[1:])
    tokenizer.bos_token = None
    base = save(tmp_path / "base", make_model(tokenizer), tokenizer)
    described = tokenizer.backend_tokenizer.to_str()
    for old, new in names.items():
        described = described.replace(json.dumps(old), json.dumps(new))
    renamed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(described), bos_token=begin, eos_token=end, pad_token=end
    )
    distilled = save(
        tmp_path / "distilled", fine_tune(AutoModelForCausalLM.from_pretrained(base), 3, noise=0.1), renamed
    )
    result = run(recipe("omp_linear", [base, distilled], distilled), tmp_path / "out")
    for name in (EMBED, HEAD):
        own, its = tensors_of(distilled)[name], tensors_of(base)[name]
        torch.testing.assert_close(result[name][:2], (own[:2] + its[:2]) / 2)
        assert torch.equal(rows_of(tmp_path / "out", result, name, (user,)), own[2:3])
        torch.testing.assert_close(result[name][3:], (own[3:] + its[3:]) / 2)
    [model] = [described for described in read_record(tmp_path / "out")["models"] if described["name"] == str(base)]
    assert model["match"]["special renamed"] == 2


@pytest.mark.parametrize(("copy_rows", "copies"), [("auto", 2), ("always", 2), ("never", 0)])
def test_copy_rows_in_one_space(copy_rows: str, copies: int, models: dict[str, Path], tmp_path: Path) -> None:
    inputs = [models["plain"], models["chat"]]
    made = recipe("omp_linear", inputs, "union", parameters={"copy_rows": copy_rows})
    result = run(made, tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert sum(copy["tokens"] for copy in record["tensors"][0]["copied"]) == copies
    assert [solve["targets"] for solve in record["solves"]] == ([] if copies else [2, 2])
    kept = rows_of(models["chat"], tensors_of(models["chat"]), EMBED, TURNS)
    assert torch.equal(rows_of(tmp_path / "out", result, EMBED, TURNS), kept) is bool(copies)


def test_copy_rows_across_spaces(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that ``always`` copies between unrelated models of one width, and that ``auto`` does not."""
    base, other = models["base"], models["other"]
    own = tensors_of(other)[EMBED]
    forced = run(recipe("omp", [base], other, parameters={"copy_rows": "always"}), tmp_path / "always")
    asked = run(recipe("omp", [base], other), tmp_path / "auto")
    never = run(recipe("omp", [base], other, parameters={"copy_rows": "never"}), tmp_path / "never")
    [copied] = read_record(tmp_path / "always")["tensors"][0]["copied"]
    assert int((forced[EMBED] == own).all(dim=1).sum()) == copied["tokens"] > 50
    trained = own.any(dim=1)  # the padding token's row is zero in both
    assert not (asked[EMBED] == own).all(dim=1)[trained].any()
    assert all(torch.equal(asked[name], tensor) for name, tensor in never.items())


def test_an_override_wins_and_force_still_approximates(models: dict[str, Path], tmp_path: Path) -> None:
    inputs = [models["plain"], models["chat"]]
    tokens = {"<|im_start|>": {"source": {"kind": "zero"}}, "<|im_end|>": {"force": True}}
    made = recipe("omp_linear", inputs, models["chat"], tokenizer={"source": str(models["chat"]), "tokens": tokens})
    result = run(made, tmp_path / "out")
    own = tensors_of(models["chat"])[EMBED]
    start, end = rows_of(tmp_path / "out", result, EMBED, TURNS)
    assert torch.equal(start, rows_of(models["chat"], {EMBED: own}, EMBED, TURNS)[0] / 2)
    assert not torch.equal(end, rows_of(models["chat"], {EMBED: own}, EMBED, TURNS)[1])
    assert [solve["targets"] for solve in read_record(tmp_path / "out")["solves"]] == [1, 1]


def test_inputs_of_two_precisions(models: dict[str, Path], tmp_path: Path) -> None:
    """Check that without ``dtype:`` a float32 row is unchanged beside a bfloat16 input, as in mergekit."""
    half = write(tmp_path / "half", models["base"], (), 1, dtype=torch.bfloat16)
    made = recipe("omp_linear", [half, models["chat"]], "union")
    del made["dtype"]
    result = run(made, tmp_path / "out")
    kept = rows_of(models["chat"], tensors_of(models["chat"]), EMBED, TURNS)
    assert torch.equal(rows_of(tmp_path / "out", result, EMBED, TURNS).float(), kept.to(result[EMBED].dtype).float())
    del made["parameters"]["k"]
    expected = run({**made, "merge_method": "linear"}, tmp_path / "expected")
    assert result[EMBED].dtype == expected[EMBED].dtype
    ours, its = both(tmp_path, {"out": result, "expected": expected}, EMBED, TURNS)
    assert torch.equal(ours, its)


def test_the_log_and_inspect_describe_copies(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Check also that rows are compared once, although ``unsafe_tokens`` plans the rows of both matrices for each."""
    made = recipe("omp_linear", [models["plain"], models["chat"], models["other"]], "union")
    made["parameters"]["unsafe_tokens"] = "mean"
    with caplog.at_level(logging.INFO):
        run(made, tmp_path / "out", quiet=False)
    plain, chat, other = (str(models[name]) for name in ("plain", "chat", "other"))
    lines = [line for line in caplog.messages if line.startswith("input embedding: the rows of shared tokens of")]
    assert any(plain in line and line.endswith(f"the rows of 2 tokens of {chat} are copied") for line in lines)
    assert any(line.endswith(f"tokens of {other} are not copied") for line in lines)
    assert len(lines) == len(set(lines))

    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(made))
    text = CliRunner().invoke(inspect, [str(path), "--no-time"], env={"COLUMNS": "1000"}).stdout
    assert f"2 tokens that only {chat} has: copied (median similarity of the rows of shared tokens: 1.00)" in text
    found = json.loads(CliRunner().invoke(inspect, [str(path), "--no-time", "--json"]).stdout)
    copied = {(model["name"], copy["model"]): copy for model in found["inputs"] for copy in model["copied"]}
    assert copied[plain, chat]["copied"] is True
    assert copied[plain, chat]["similarity"] == pytest.approx(1, abs=0.01)
    assert copied[plain, chat]["tokens"] == 2
    assert copied[chat, other]["copied"] is False
    assert abs(copied[chat, other]["similarity"]) < 0.1
    assert not [s for s in found["solves"] if (s["base"], s["donor"]) == (plain, chat)]


def test_similarity_of_real_models(smollm2_dir: Path, gemma3_dir: Path) -> None:
    """Check that a noisy copy shares the space, and that other tokens, other axes and other models do not.

    With noise of half the standard deviation σ of the matrix, the similarity is 2 s² / (2 s² + σ² / 4), where s² is
    the variance of the rows around their mean.
    """
    smollm2, gemma = (tensors_of(folder)[EMBED].float() for folder in (smollm2_dir, gemma3_dir))
    generator = torch.Generator().manual_seed(0)
    for rows in (smollm2, gemma):
        noise = torch.randn(rows.shape, generator=generator) * rows.std() / 2
        variance = (rows - rows.mean(dim=0)).square().mean()
        expected = float(2 * variance / (2 * variance + rows.var() / 4))
        assert expected > 0.75
        assert similarity(rows, rows + noise) == pytest.approx(expected, abs=0.03)
        assert similarity(rows, rows) == pytest.approx(1)
        assert abs(similarity(rows, rows.flip(0))) < 0.05
        assert abs(similarity(rows, rows.flip(1))) < 0.05
    assert abs(similarity(smollm2, gemma[: len(smollm2), :576])) < 0.05
