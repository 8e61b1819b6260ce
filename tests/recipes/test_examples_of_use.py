"""Test the scripts in examples/ that use a transplanted model, on small models."""

import re
from pathlib import Path

import assisted_generation
import distillation_loss
import domain_vocabulary
import heal_then_merge
import logit_ensemble
import one_vocabulary
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import merge_here, recipe
from helpers.versions import since
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mergekit_omp.cli.main import main as omp
from mergekit_omp.evaluation.bits_per_byte import WINDOW_BYTES, read_text, windows

TEXT = "The river and the hills, the dog and the fox, and 12 numbers."
ACROSS_TOKENIZERS = since("5.16", "assisted generation across any two tokenizers")
LONG_TEXT = "\n".join([*ENGLISH, *PYTHON]) + "\n"


def trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Train a small model on a text, so that a transplant loses something."""
    ids = torch.tensor([tokenizer(LONG_TEXT).input_ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80):
        start = (step * 37) % (ids.shape[1] - 128)
        part = ids[:, start : start + 128]
        optimizer.zero_grad()
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write two models with different tokenizers, and the second, a trained one, with the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers = {"a": byte_level_tokenizer(ENGLISH), "b": sentencepiece_tokenizer(PYTHON)}
    models = {
        name: make_model(tokenizer, seed=seed, hidden=32 + 16 * seed)
        for seed, (name, tokenizer) in enumerate(tokenizers.items())
    }
    trained(models["b"], tokenizers["b"])
    made = {name: save(folder / name, models[name], tokenizers[name]) for name in models}
    result = merge_here(recipe(made["b"], made["a"]), folder / "b-like-a")
    assert result.exit_code == 0, result.output
    return made | {"b-like-a": folder / "b-like-a"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a text that is long enough to train on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(LONG_TEXT * 8)
    return path


@pytest.fixture(scope="module")
def healed(folders: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the transplanted model for some steps."""
    out = tmp_path_factory.mktemp("healed") / "out"
    options = ["--text", str(text), "--tokens", "4000", "--dtype", "float32"]
    result = CliRunner().invoke(omp, ["heal", str(folders["b-like-a"]), str(out), *options])
    assert result.exit_code == 0, result.output
    return out


def near_copy(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    """Write a draft that agrees with its target in some positions."""
    draft = type(model)(model.config)
    draft.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)
    return draft.eval()


def greedy(model: PreTrainedModel, ids: list[int], n_tokens: int) -> list[int]:
    """Continue ids with a full forward pass per token; stop after eos."""
    made: list[int] = []
    while len(made) < n_tokens and model.config.eos_token_id not in made:
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def by_hand(
    target: PreTrainedModel, draft: PreTrainedModel, ids: list[int], n_tokens: int, n_draft: int
) -> tuple[list[int], int, int]:
    """Run assisted generation by its definition; return new ids, and numbers of proposed and accepted tokens."""
    made: list[int] = []
    proposed = accepted = 0
    expected = greedy(target, ids, n_tokens)
    while len(made) < len(expected):
        proposal = greedy(draft, ids + made, min(n_draft, n_tokens - len(made) - 1))
        remaining = expected[len(made) :]
        kept = next((i for i, token in enumerate(proposal) if [token] != remaining[i : i + 1]), len(proposal))
        made = expected[: len(made) + kept + 1]
        proposed += len(proposal)
        accepted += kept
    return made, proposed, accepted


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.1, 1.0])
def test_accepted_tokens_are_counted_as_by_hand(folders: dict[str, Path], scale: float) -> None:
    target, tokenizer = one_vocabulary.load(str(folders["a"]))
    draft = near_copy(target, scale)
    assisted_generation.prepare(draft, target, draft_tokens=3)
    counts = []
    for text in (TEXT, "def", "Every piece"):
        prompt = one_vocabulary.with_start(tokenizer, text)
        run = assisted_generation.generate(target, prompt, 17, draft)
        new, *expected = by_hand(target, draft, prompt[0].tolist(), 17, 3)
        assert run.ids.tolist() == prompt[0].tolist() + new
        assert [run.proposed, run.accepted] == expected
        counts.append(expected)
        alone = assisted_generation.generate(target, prompt, 17)
        assert torch.equal(alone.ids, run.ids)
        assert (alone.proposed, alone.accepted) == (0, 0)
    proposed, accepted = map(sum, zip(*counts, strict=True))
    assert (accepted == proposed) if scale == 0 else (accepted < proposed)


def test_an_accepted_end_of_text_counts(folders: dict[str, Path]) -> None:
    """Check a target whose text ends within a proposal: all of it is accepted, and nothing follows."""
    target, tokenizer = one_vocabulary.load(str(folders["a"]))
    prompt = one_vocabulary.with_start(tokenizer, TEXT)
    written = greedy(target, prompt[0].tolist(), 8)
    end = next(i for i, token in enumerate(written) if token not in written[:i] and i >= 2)
    for model in (target, draft := near_copy(target, 0.0)):
        model.config.eos_token_id = model.generation_config.eos_token_id = written[end]
    assisted_generation.prepare(draft, target, draft_tokens=end + 1)
    run = assisted_generation.generate(target, prompt, 20, draft)
    assert run.ids[prompt.shape[1] :].tolist() == written[: end + 1]
    assert (run.proposed, run.accepted) == (end + 1, end + 1)


def test_a_target_with_more_rows_than_tokens(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["a"])
    target = make_model(tokenizer, rows=len(tokenizer) + 44, seed=5).eval()
    draft, _ = one_vocabulary.load(str(folders["b-like-a"]))
    assisted_generation.prepare(draft, target, draft_tokens=3)
    prompt = one_vocabulary.with_start(tokenizer, TEXT)
    assisted = assisted_generation.generate(target, prompt, 12, draft)
    assert torch.equal(assisted.ids, assisted_generation.generate(target, prompt, 12).ids)
    assert assisted.proposed > 0


@pytest.mark.parametrize("own", ["a", pytest.param("b", marks=ACROSS_TOKENIZERS)])
def test_a_draft_with_its_own_tokenizer(folders: dict[str, Path], own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the counts against the number of rounds, also for a draft with as many rows as the target."""
    target, tokenizer = one_vocabulary.load(str(folders["a"]))
    draft, own_tokenizer = one_vocabulary.load(str(folders[own]))
    assisted_generation.prepare(draft, target, draft_tokens=3, own_tokenizer=True)
    rounds: list[int] = []
    count = assisted_generation.count
    monkeypatch.setattr(assisted_generation, "count", lambda *given: (rounds.append(len(given[0])), count(*given))[1])
    accepted = 0
    for text in (TEXT, "def", "Every piece"):
        prompt = one_vocabulary.with_start(tokenizer, text)
        run = assisted_generation.generate(target, prompt, 17, draft, (tokenizer, own_tokenizer))
        assert torch.equal(run.ids, assisted_generation.generate(target, prompt, 17).ids)
        new = len(run.ids) - prompt.shape[1]
        # Each round adds what it accepts and one more token, but for a last one whose proposal ends the text.
        assert run.accepted + rounds[-2] - new in (0, 1)
        assert run.proposed >= run.accepted
        accepted += run.accepted
    assert accepted > 0 or own == "b"


def table(output: str) -> dict[str, list[str]]:
    """Return the cells of the table at the end of a script's output, by draft."""
    _, _, rows = output.partition("\ndraft  ")
    return {name: cells.split() for name, cells in re.findall(r"^(\S.*?)  +(.*)$", rows, re.MULTILINE)}


@ACROSS_TOKENIZERS
def test_assisted_generation(folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run the script, with its own transplant by mergekit's command."""
    models = ["--target", str(folders["a"]), "--draft", str(folders["b"]), "--out", str(tmp_path / "out")]
    assisted_generation.main([*models, "-k", "5", "--tokens", "10"])
    output = capfd.readouterr().out
    rows = table(output)
    assert list(rows) == ["none", "own tokenizer, across vocabularies", "transplanted"]
    assert [cells[-3:] for cells in rows.values()][1:] == [["4", "of", "4"]] * 2
    assert output.count("the target's own text: yes") == 8
    assert f"mergekit-omp heal {tmp_path / 'out'} healed/" in output
    vocabulary = AutoTokenizer.from_pretrained(folders["a"]).get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == vocabulary


@ACROSS_TOKENIZERS
def test_assisted_generation_with_a_healed_draft(
    folders: dict[str, Path], healed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Check the table against the lines above it; the record of the transplant names the draft before it."""
    models = ["--target", str(folders["a"]), "--transplanted", str(folders["b-like-a"]), "--healed", str(healed)]
    assisted_generation.main([*models, "--tokens", "10"])
    output = capfd.readouterr().out
    rows = table(output)
    assert list(rows) == ["none", "own tokenizer, across vocabularies", "transplanted", "healed"]
    assert "No healed model" not in output
    for name in list(rows)[1:]:
        counts = re.findall(rf"^  {name}: accepted (\d+) of (\d+) draft tokens", output, re.MULTILINE)
        accepted, proposed = (sum(map(int, column)) for column in zip(*counts, strict=True))
        assert len(counts) == 4
        assert proposed > 0
        assert rows[name][:4] == [f"{accepted / proposed:.3f}", f"({accepted}", "of", f"{proposed})"]
        assert rows[name][5:] == ["4", "of", "4"]
    assert all(float(cells[-4]) > 0 for cells in list(rows.values())[1:])


def test_a_transplant_without_a_record_does_not_name_its_base(folders: dict[str, Path]) -> None:
    models = ["--target", str(folders["a"]), "--transplanted", str(folders["b"])]
    with pytest.raises(SystemExit, match="does not name the model before the transplant"):
        assisted_generation.main(models)


def test_loss_is_the_divergence(folders: dict[str, Path]) -> None:
    student, tokenizer = one_vocabulary.load(str(folders["a"]))
    teacher, _ = one_vocabulary.load(str(folders["b-like-a"]))
    ids = one_vocabulary.with_start(tokenizer, TEXT)
    size = len(tokenizer)
    loss = distillation_loss.distillation_loss(teacher, student, ids, size)
    with torch.no_grad():
        expected, given = (model(ids).logits[0, :, :size].double().softmax(dim=1) for model in (teacher, student))
    by_hand = sum(float((p * (p / q).log()).sum()) for p, q in zip(expected, given, strict=True)) / ids.shape[1]
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    assert distillation_loss.distillation_loss(student, student, ids, size).item() == pytest.approx(0, abs=1e-6)


def test_a_step_down_the_gradient_lowers_the_loss(folders: dict[str, Path]) -> None:
    student, tokenizer = one_vocabulary.load(str(folders["a"]))
    teacher, _ = one_vocabulary.load(str(folders["b-like-a"]))
    ids = one_vocabulary.with_start(tokenizer, TEXT)
    before = distillation_loss.distillation_loss(teacher, student, ids, len(tokenizer))
    before.backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    with torch.no_grad():
        for weight in student.parameters():
            weight -= 0.01 * weight.grad
        assert distillation_loss.distillation_loss(teacher, student, ids, len(tokenizer)) < before


def test_padding_does_not_count(folders: dict[str, Path]) -> None:
    """Compare models with different numbers of rows: only tokens count."""
    (one, tokenizer), (padded, _) = (one_vocabulary.load(str(folders["a"])) for _ in range(2))
    padded.resize_token_embeddings(len(tokenizer) + 60, mean_resizing=False)
    ids = one_vocabulary.with_start(tokenizer, TEXT)
    assert distillation_loss.distillation_loss(padded, one, ids, len(tokenizer)).item() == pytest.approx(0, abs=1e-6)
    mixed = logit_ensemble.mix(one(ids).logits, padded(ids).logits, 0.5)
    assert torch.allclose(mixed, one(ids).logits.log_softmax(dim=-1), atol=1e-5)


def losses(output: str) -> dict[str, list[float]]:
    """Return the losses that the script printed, by teacher."""
    rows = re.findall(r"^(\w+ teacher|zeros for new rows) +(.*)$", output, re.MULTILINE)
    return {name: [float(loss) for loss in cells.split()] for name, cells in rows}


def test_distillation_loss(folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models = ["--student", str(folders["a"]), "--teacher", str(folders["b"]), "--out", str(tmp_path / "out")]
    distillation_loss.main([*models, "--transplanted", str(folders["b-like-a"])])
    output = capfd.readouterr().out
    teachers = losses(output)
    assert list(teachers) == ["transplanted teacher", "zeros for new rows"]
    assert [len(row) for row in teachers.values()] == [4, 4]
    assert all(loss > 0 for row in teachers.values() for loss in row)
    assert teachers["transplanted teacher"] != teachers["zeros for new rows"]
    assert output.count("21 of 21 tensors") == 2
    assert f"mergekit-omp heal {folders['b-like-a']} healed/" in output


def test_distillation_loss_of_a_healed_teacher(
    folders: dict[str, Path], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Check that the script heals the teacher, and that its row is the loss of the model that was written."""
    models = ["--student", str(folders["a"]), "--transplanted", str(folders["b-like-a"])]
    out = ["--out", str(tmp_path / "out"), "--text", str(text)]
    distillation_loss.main([*models, *out, "--heal-minutes", "0.1", "--heal-text", str(text)])
    teachers = losses(capfd.readouterr().out)
    assert list(teachers) == ["transplanted teacher", "healed teacher", "zeros for new rows"]
    student, tokenizer = one_vocabulary.load(str(folders["a"]))
    teacher, _ = one_vocabulary.load(str(tmp_path / "out-healed"))
    ids = one_vocabulary.with_start(tokenizer, windows(text.read_text(), WINDOW_BYTES)[0])
    loss = distillation_loss.distillation_loss(teacher, student, ids, len(tokenizer)).item()
    assert teachers["healed teacher"] == [pytest.approx(loss, abs=1e-4)]
    assert teachers["healed teacher"] != teachers["transplanted teacher"]


def test_heal_then_merge(
    folders: dict[str, Path], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Check that the merge is of the healed model and the partner, and that healing matters to it."""
    tokenizer = AutoTokenizer.from_pretrained(folders["a"])
    partner = save(tmp_path / "partner", make_model(tokenizer, seed=7, hidden=48), tokenizer)
    out = tmp_path / "out"
    models = ["--model", str(folders["b"]), "--partner", str(partner), "--out", str(out), "-k", "5"]
    heal_then_merge.main([*models, "--tokens", "4000", "--text", str(text)])
    commands = re.findall(r"^\$ \S+/(mergekit-\w+) ", capfd.readouterr().out, re.MULTILINE)
    assert commands == ["mergekit-yaml", "mergekit-omp", "mergekit-yaml"]

    merge = yaml.safe_load((out / "merged.yml").read_text())
    assert merge["models"][0]["model"] == str(out / "healed")
    merge["models"][0]["model"] = str(out / "transplanted")
    result = merge_here(merge, tmp_path / "without")
    assert result.exit_code == 0, result.output
    merged, without = tensors_of(out / "merged"), tensors_of(tmp_path / "without")
    parts = [tensors_of(out / "healed"), tensors_of(partner)]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        assert not torch.equal(merged[name], without[name])
        mean = (parts[0][name].float() + parts[1][name].float()) / 2
        torch.testing.assert_close(merged[name].float(), mean, rtol=0.02, atol=1e-3)

    merged_tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    assert merged_tokenizer.get_vocab() == tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert torch.isfinite(model(**merged_tokenizer(TEXT, return_tensors="pt")).logits).all()


def test_an_ensemble_of_a_model_with_itself_is_the_model(folders: dict[str, Path]) -> None:
    model, tokenizer = one_vocabulary.load(str(folders["a"]))
    alone, both = (
        read_text(reader, tokenizer, TEXT).bits for reader in (model, logit_ensemble.Reader(model, model, 0.3))
    )
    assert both == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_ensemble_is_the_normalised_product(folders: dict[str, Path], weight: float) -> None:
    """Check p ∝ p_a^(1 - w) p_b^w for reading and for generation."""
    (model, tokenizer), (other, _) = (one_vocabulary.load(str(folders[name])) for name in ("a", "b-like-a"))
    ids = one_vocabulary.with_start(tokenizer, TEXT)

    def product(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            one, two = (reader(tokens).logits[0, :, : len(tokenizer)].double().softmax(1) for reader in (model, other))
        powers = one ** (1 - weight) * two**weight
        return powers / powers.sum(dim=1, keepdim=True)

    bits = -product(ids)[:-1].gather(1, ids[0, 1:, None]).log2().sum().item()
    reader = logit_ensemble.Reader(model, other, weight)
    assert read_text(reader, tokenizer, TEXT).bits == pytest.approx(bits, rel=1e-4)

    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, product(expected)[-1].argmax().view(1, 1)], dim=1)
    written = model.generate(
        ids,
        logits_processor=[logit_ensemble.Ensemble(other, weight)],
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=-1,
    )
    assert torch.equal(written, expected)


def test_logit_ensemble(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Check that with all weight on one model the last column is that of this model."""
    models = ["--model", str(folders["a"]), "--transplanted", str(folders["b-like-a"]), "--bytes", "300"]
    for weight, same in (("0", 0), ("1", 1)):
        logit_ensemble.main([*models, "--weight", weight, "--tokens", "4"])
        rows = re.findall(r"^[a-z]+ +([\d.]+) +([\d.]+) +([\d.]+)$", capfd.readouterr().out, re.MULTILINE)
        assert len(rows) == 4
        assert [row[2] for row in rows] == [row[same] for row in rows]
        assert [row[0] for row in rows] != [row[1] for row in rows]


def test_domain_vocabulary(folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check fewer tokens for the same text, and a model that loads and has a row for every token."""
    text, out = tmp_path / "domain.txt", tmp_path / "out"
    text.write_text("".join(PYTHON) * 4)
    domain_vocabulary.main(["--model", str(folders["a"]), "--text", str(text), "--size", "400", "--out", str(out)])
    training_text, held_out = domain_vocabulary.split(text.read_text())
    assert training_text + held_out == text.read_text()
    assert not list((tmp_path / "out-tokenizer").glob("*.safetensors"))

    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (folders["a"], out)]
    counts = [len(tokenizer(held_out).input_ids) for tokenizer in tokenizers]
    assert counts[1] < counts[0]
    shown = re.search(r"^held out +[\d.]+ +([\d.]+) +[\d.]+% +[\d.]+ +([\d.]+) ", capfd.readouterr().out, re.MULTILINE)
    n_bytes = len(held_out.encode())
    assert [float(value) for value in shown.groups()] == pytest.approx([value / n_bytes for value in counts], abs=6e-4)

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizers[1])
    assert torch.isfinite(model(**tokenizers[1](held_out, return_tensors="pt")).logits).all()
    assert tokenizers[1].get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "out-tokenizer").get_vocab()


def test_a_tokenizer_that_cannot_encode_every_text_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="use a model with byte-level BPE"):
        domain_vocabulary.train_tokenizer(str(folders["b"]), "".join(PYTHON), 300, tmp_path / "tokenizer")
    with pytest.raises(SystemExit, match="too few lines"):
        domain_vocabulary.split("one line")
