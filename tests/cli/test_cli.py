"""Test the commands of ``mergekit-omp``: their output is correct, and their files are complete."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
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
from matplotlib.colors import to_hex
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from transformers import AutoTokenizer

from mergekit_omp.cli.main import main
from mergekit_omp.evaluation.bits_per_byte import builtin_texts
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.report import record as record_module
from mergekit_omp.report.pictures import KEPT, draw_matches
from mergekit_omp.report.record import read_record

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a base, and a donor with an HTML token, a special token without a match, and one that is not text."""
    folder = tmp_path_factory.mktemp("pair")
    base_tokenizer = sentencepiece_tokenizer(ENGLISH)
    donor_tokenizer = byte_level_tokenizer(PYTHON, special=("<|lonely|>",))
    donor_tokenizer.add_tokens(["<script>alert(1)</script>"])
    return (
        save(folder / "base", make_model(base_tokenizer, seed=1), base_tokenizer),
        save(folder / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=24), donor_tokenizer),
    )


@pytest.fixture(scope="module")
def transplanted(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transplanted") / "a <b>bold name"
    result = merge_here(recipe(*pair), out, "--quiet")
    assert result.exit_code == 0, result.output
    return out


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: str | Path) -> str:
    """Return the output of a command that must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def sentence(*arguments: str | Path) -> str:
    """Return the error message of a command that must fail."""
    result = call(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    return " ".join(result.stderr.split("Error: ", 1)[1].split())


def test_inspect_agrees_with_the_record(pair: tuple[Path, Path], transplanted: Path) -> None:
    found = json.loads(answer("inspect", *pair, "-k", "5", "--json"))
    record = json.loads((transplanted / "omp_record.json").read_text())
    [foreseen], [done] = found["inputs"], [model for model in record["models"] if "input" in model["roles"]]
    for key in ("kept", "lacking", "anchors", "match", "advice"):
        assert foreseen[key] == done[key], key
    assert found["tokens"] == record["tokens"]
    [solve] = found["solves"]
    assert solve["matrices"] == len(record["solves"]) == 2
    assert (solve["targets"], solve["atoms"], solve["k"]) == tuple(
        record["solves"][0][n] for n in ("targets", "atoms", "k")
    )
    assert found["estimate"]["solve_seconds"] > 0
    size = sum(path.stat().st_size for path in transplanted.glob("*.safetensors"))
    assert found["estimate"]["output_bytes"] == pytest.approx(size, rel=0.1)


def test_inspect_needs_no_weights(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json.loads(answer("inspect", *pair, "--json", "--no-time"))
    for path in pair:
        shutil.copytree(path, tmp_path / f"a {path.name}", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(LazyTensorLoader, "get_tensor", lambda *_, **__: pytest.fail("weights were read"))
    found = answer("inspect", tmp_path / "a base", tmp_path / "a donor", "--json", "--no-time")
    for path in pair:
        found = found.replace(f"{tmp_path}/a {path.name}", str(path))
    assert json.loads(found) == expected
    assert expected["estimate"]["solve_seconds"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"a base", "a donor"}, "nothing is written"


def test_inspect_text(pair: tuple[Path, Path]) -> None:
    text = answer("inspect", *pair)
    assert re.search(r"^ +<\|endoftext\|> +<eos> +special role$", text, re.MULTILINE)
    assert "special tokens without a match: <|lonely|>" in text
    assert re.search(r"\d+ of \d+ tokens keep a row of this model, \d+ are new", text)
    assert re.search(rf"^  {pair[1]} +\d+ +\d+ +64 +2 +\d+ s$", text, re.MULTILINE), "solves for both matrices"
    for line in ("time to solve", "peak memory", "disk"):
        assert re.search(rf"{line} +[\d.]+ (s|GB|MB)", text), line


def test_inspect_recipe_with_k_in_several_places(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Check that the estimate is for the largest k, and that a tied base needs one solve."""
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    tied = save(tmp_path / "tied", make_model(tokenizer, tied=True), tokenizer)
    given = recipe(tied, pair[1], parameters={"k": [{"filter": "lm_head", "value": 7}, {"value": 3}]})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(given))
    [solve] = json.loads(answer("inspect", tmp_path / "recipe.yml", "--json", "--no-time"))["solves"]
    assert (solve["k"], solve["matrices"]) == (7, 1)


def merge_of(block: str, pair: tuple[Path, Path], tuned: Path) -> dict[str, Any]:
    """Return a recipe in which k is 3 for one input, and the default for the others."""
    given = recipe(pair[0], pair[1], merge_method="omp_linear", base_model=str(pair[0]), parameters={"weight": 0.5})
    [listed] = given.pop("models")
    small = {"model": str(tuned), "parameters": {"k": 3}}
    whole = {"layer_range": [0, 2]}
    if block == "slices":
        return given | {"slices": [{"sources": [small | whole, listed | whole]}]}
    return given | ({"models": [small]} if block == "models" else {"modules": {"default": {"models": [small]}}})


@pytest.mark.parametrize("block", ["models", "modules", "slices"])
def test_inspect_a_base_with_the_default(pair: tuple[Path, Path], tmp_path: Path, block: str) -> None:
    """Check a base without a k of its own, also one that only ``base_model`` names."""
    tuned = shutil.copytree(pair[0], tmp_path / "tuned")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(merge_of(block, pair, tuned)))
    solves = json.loads(answer("inspect", tmp_path / "recipe.yml", "--json", "--no-time"))["solves"]
    assert {solve["k"] for solve in solves} == {OmpParameters().k}


@pytest.mark.parametrize("filters", [["lm_head"], ["lm_head", "*"]])
def test_inspect_a_filter_without_a_value_for_the_rest(
    pair: tuple[Path, Path], tmp_path: Path, filters: list[str]
) -> None:
    given = recipe(*pair, parameters={"k": [{"filter": name, "value": 3} for name in filters]})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(given))
    [solve] = json.loads(answer("inspect", tmp_path / "recipe.yml", "--json", "--no-time"))["solves"]
    assert solve["k"] == (3 if "*" in filters else OmpParameters().k)


def test_inspect_same_vocabulary(pair: tuple[Path, Path]) -> None:
    text = answer("inspect", pair[0], pair[0])
    assert "none: there are no new tokens" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "merge_method: linear\nmodels: []",
            "merge_method is 'linear'; name a recipe with merge_method: omp or omp_<method>.",
        ),
        ("- a list", "merge_method is None; name a recipe with merge_method: omp or omp_<method>."),
        ("", "merge_method is None; name a recipe with merge_method: omp or omp_<method>."),
        ("a: [", "recipe.yml: invalid YAML: while parsing a flow node"),
        ("merge_method: omp\nmodels: x", "models: 'x' is invalid; write a list"),
        (b"\xff\xfe", "cannot be read (not UTF-8); name a text file."),
    ],
)
def test_inspect_bad_recipe(tmp_path: Path, text: str | bytes, expected: str) -> None:
    (tmp_path / "recipe.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in sentence("inspect", tmp_path / "recipe.yml")


def test_inspect_bad_arguments(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory); name a text file." in sentence("inspect", tmp_path / "none")
    assert sentence("inspect", "a", "b", "c") == "Name one recipe, whose own k counts, or a base model and a donor."
    assert "--device: nowhere cannot be used here" in sentence("inspect", *pair, "--device", "nowhere")
    assert sentence("inspect", tmp_path / "a", pair[1]).startswith("models[0].model: ")


def test_record_adds_up(transplanted: Path) -> None:
    """Check that every count in the record is a partition of its total."""
    record = json.loads((transplanted / "omp_record.json").read_text())
    [model] = [model for model in record["models"] if "input" in model["roles"]]
    assert sum(model["match"].values()) == record["tokens"]
    assert record["tokens"] == len(AutoTokenizer.from_pretrained(transplanted).get_vocab())
    for solve in record["solves"]:
        assert sum(solve["residuals"]["counts"]) == solve["targets"] == model["lacking"]
        assert len(solve["residuals"]["edges"]) == len(solve["residuals"]["counts"]) + 1
        usage = solve["usage"]
        assert usage["never"] + sum(usage_bin["anchors"] for usage_bin in usage["counts"]) == solve["atoms"]
        assert 0 < solve["residuals"]["median"] <= solve["residuals"]["p95"] <= 1
    assert {tensor["name"]: tensor["solves"] for tensor in record["tensors"]} == {EMBED: [0], HEAD: [1]}
    assert [tensor["side"] for tensor in record["tensors"] if tensor["name"] == HEAD] == ["LM head"]


def test_neighbours_in_the_record(pair: tuple[Path, Path], transplanted: Path) -> None:
    """Compare with the cosines of all pairs."""
    record = json.loads((transplanted / "omp_record.json").read_text())
    assert len(record["samples"]) == 12
    for folder, key in ((pair[1], "donor_neighbours"), (transplanted, "output_neighbours")):
        rows = torch.nn.functional.normalize(tensors_of(folder)[EMBED])
        cosines = rows @ rows.T
        cosines.fill_diagonal_(-2)
        for sample in record["samples"]:
            expected = cosines[sample["id"]].topk(5).values.tolist()
            assert [neighbour["cosine"] for neighbour in sample[key]] == pytest.approx(expected, abs=1e-3)


def test_tokens_per_byte_in_the_record(pair: tuple[Path, Path], transplanted: Path) -> None:
    record = json.loads((transplanted / "omp_record.json").read_text())
    text = builtin_texts()["prose"]
    [prose] = [text for text in record["texts"] if text["name"] == "prose"]
    for folder, key in ((pair[0], "before"), (pair[1], "after")):
        tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
        assert prose[key] == pytest.approx(len(tokens) / len(text.encode()))


def test_section_of_the_model_card(transplanted: Path) -> None:
    card = (transplanted / "README.md").read_text()
    assert card.count("### Tokenizer transplantation") == 1
    assert re.search(r"of \d+ tokens \d+ keep their rows and \d+ are new", card)
    assert "| prose | " in card


class Page(HTMLParser):
    """Parses a page: its text, and everything that a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_page_is_one_file(transplanted: Path, tmp_path: Path) -> None:
    text = answer("report", transplanted, "--html", tmp_path / "page.html")
    assert re.search(rf"^  {EMBED} +\d+ +\d+ +5 +\d+\.\d( +0\.\d{{3}}){{3}}$", text, re.MULTILINE)
    assert f"Page with pictures: {tmp_path}/page.html" in text
    page = Page((tmp_path / "page.html").read_text())
    assert all(reference.startswith("#") for reference in page.references), "nothing is loaded from elsewhere"
    assert page.tags.count("svg") == 4
    assert {"script", "img", "link", "b"} & set(page.tags) == {"b"}
    assert "a <b>bold name" in page.text, "what names and tokens say is text and no markup"
    for heading in ("Origin of the rows", "Approximation error", "Sample tokens", "Details"):
        assert heading in page.text


def test_report_beside_the_model_and_as_json(transplanted: Path) -> None:
    answer("report", transplanted)
    assert (transplanted / "omp_report.html").exists()
    (transplanted / "omp_report.html").unlink()
    assert json.loads(answer("report", transplanted, "--json")) == json.loads(
        (transplanted / "omp_record.json").read_text()
    )
    assert not (transplanted / "omp_report.html").exists()


def test_report_escapes_tokens(transplanted: Path, tmp_path: Path) -> None:
    evil = json.loads((transplanted / "omp_record.json").read_text())
    evil["samples"][0]["token"] = "<script>alert(1)</script>"
    evil["solves"][0]["usage"]["most_used"][0]["token"] = "<img src=x onerror=alert(1)>"
    (tmp_path / "omp_record.json").write_text(json.dumps(evil))
    answer("report", tmp_path)
    page = Page((tmp_path / "omp_report.html").read_text())
    assert not {"script", "img"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize("source", ["union", "base"])
def test_report_of_several_inputs(pair: tuple[Path, Path], tmp_path: Path, source: str) -> None:
    base, _ = pair
    tokenizer = byte_level_tokenizer(PYTHON)
    other = save(tmp_path / "other", make_model(tokenizer, seed=4), tokenizer)
    given = recipe(base, source, merge_method="omp_linear", parameters={"k": 5, "weight": 0.5})
    given["models"].append({"model": str(other)})
    out = tmp_path / "out"
    assert merge_here(given, out, "--quiet").exit_code == 0
    text = answer("report", out)
    assert str(base) in text
    assert str(other) in text
    assert Page((out / "omp_report.html").read_text()).tags.count("svg") == 4


def test_report_evaluates(pair: tuple[Path, Path], transplanted: Path, tmp_path: Path) -> None:
    """What it draws is what `eval --base` measures; `--base` names a base that has been moved."""
    text = answer("report", transplanted, "--evaluate", "--html", tmp_path / "page.html")
    [expected] = json.loads(answer("eval", transplanted, "--base", pair[0], "--json"))
    overall = expected["overall"]
    assert f"{overall['bits_per_byte']:.3f} now" in text
    cells = [number for span in overall["spans"].values() for number in list(span.values())[1:]]
    assert re.search(r"overall +-?[\d.]+ +" + " +".join(f"{number:.3f}" for number in cells), text)
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("svg") == 5
    assert f"{overall['bits_per_byte']:.3f} now" in page.text
    shutil.copytree(pair[0], tmp_path / "moved")
    found = json.loads(answer("report", transplanted, "--base", tmp_path / "moved", "--json"))["evaluation"]
    assert found["base"]["model"] == str(tmp_path / "moved")
    assert found["output"]["overall"]["spans"] == overall["spans"]


def test_report_evaluates_a_base_with_the_same_tokenizer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert merge_here(recipe(pair[0], pair[0]), out, "--quiet").exit_code == 0
    answer("report", out, "--evaluate")
    page = Page((out / "omp_report.html").read_text())
    assert page.tags.count("svg") == 2
    assert "The output has the tokenizer of the base" in page.text


def test_report_draws_what_healing_measured(transplanted: Path, tmp_path: Path) -> None:
    """No model is run for it."""
    spans = {
        key: {
            kind: {"tokens": 7, "bits_per_byte": bits, "ideal_bits_per_byte": 0.25}
            for kind in ("equal", "first piece", "later pieces", "crossing")
        }
        for key, bits in (("before", 0.875), ("after", 0.375))
    }
    healed = json.loads((transplanted / "omp_record.json").read_text()) | {"heal": spans}
    (tmp_path / "omp_record.json").write_text(json.dumps(healed))
    text = answer("report", tmp_path)
    assert re.search(r"before +2\.500( +0\.875 +0\.250){4}", text)
    assert re.search(r"after +0\.500( +0\.375 +0\.250){4}", text)
    page = Page((tmp_path / "omp_report.html").read_text())
    assert page.tags.count("svg") == 5
    assert "Bits per byte before and after healing" in page.text


def test_report_of_duplicates(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A SentencePiece donor has a digit twice; the second has no row of the base, which the picture shows."""
    out = tmp_path / "out"
    assert merge_here(recipe(pair[1], pair[0]), out, "--quiet").exit_code == 0
    match = read_record(out)["models"][0]["match"]
    assert match["duplicate"] > 0
    label = "never written, since another token has the same bytes"
    assert re.search(rf"^ +{match['duplicate']} +{label}$", answer("report", out), re.MULTILINE)
    kept = drawn_as_kept(read_record(out))
    assert kept["same bytes, other string"] == match["same bytes"]
    assert kept["a single byte"] == match["byte token"]
    assert kept[label] == kept["new token"] == kept.get("new special token", 0) == 0


def drawn_as_kept(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the lengths of the bars in the colour of kept rows in the picture of the one input, by their labels."""
    [axis] = draw_matches(record).axes
    labels = [text.get_text() for text in axis.get_yticklabels()]
    widths = [bar.get_width() for bar in axis.patches if to_hex(bar.get_facecolor()) == KEPT]
    return dict(zip(labels, widths, strict=True))


def test_report_of_reserved_tokens(tmp_path: Path) -> None:
    """Three of the donor's reserved tokens are the base's too, and two are not."""
    names = [f"<|reserved_special_token_{number}|>" for number in range(5)]
    base = byte_level_tokenizer(ENGLISH, special=tuple(names[:3]))
    donor = byte_level_tokenizer(PYTHON, special=tuple(names))
    folders = [save(tmp_path / str(seed), make_model(one, seed=seed), one) for seed, one in enumerate((base, donor))]
    assert merge_here(recipe(*folders), tmp_path / "out", "--quiet").exit_code == 0
    record = read_record(tmp_path / "out")
    assert record["models"][0]["match"]["unused"] == 5
    assert drawn_as_kept(record)["reserved for later use"] == 3


def test_report_without_new_tokens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert merge_here(recipe(pair[0], pair[0]), out, "--quiet").exit_code == 0
    assert "residual" not in answer("report", out)
    assert Page((out / "omp_report.html").read_text()).tags.count("svg") == 2


def test_report_without_a_record(tmp_path: Path) -> None:
    assert sentence("report", tmp_path) == (
        f"{tmp_path} has no omp_record.json; name the output folder of a merge with merge_method: omp."
    )
    (tmp_path / "omp_record.json").write_text("{")
    assert "omp_record.json is not valid JSON (Expecting property name" in sentence("report", tmp_path)
    (tmp_path / "omp_record.json").write_text('{"format": 99}')
    assert "omp_record.json is of another version of mergekit-omp" in sentence("report", tmp_path)
    (tmp_path / "omp_record.json").write_text('{"format": 1}')
    assert "omp_record.json is incomplete (the log of that run has the reason)" in sentence("report", tmp_path)


def test_report_without_matplotlib(transplanted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_omp.report.pictures.find_spec", lambda name: None)
    assert sentence("report", transplanted) == (
        "The page's pictures need matplotlib; run `pip install 'mergekit-omp[report]'`."
    )
    assert json.loads(answer("report", transplanted, "--json"))["format"] == 1


def test_report_that_cannot_be_written(transplanted: Path, tmp_path: Path) -> None:
    page = tmp_path / "missing" / "page.html"
    assert sentence("report", transplanted, "--html", page) == (
        f"{page} cannot be written (No such file or directory); name another with --html."
    )


@pytest.mark.parametrize("step", ["with_neighbours", "_describe_solution"])
def test_a_failing_record_does_not_cost_the_model(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: str,
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(record_module, step, fail)
    result = merge_here(recipe(*pair), tmp_path / "out")
    assert result.exit_code == 0
    assert "the record of the run is not" in caplog.text
    assert EMBED in tensors_of(tmp_path / "out")


def test_eval(pair: tuple[Path, Path], transplanted: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The river and the hills.\n" * 3)
    scores = json.loads(answer("eval", pair[0], transplanted, "--text", tmp_path / "short.txt", "--json"))
    assert [score["model"] for score in scores] == [str(pair[0]), str(transplanted)]
    assert all(score["overall"]["bytes"] == 75 for score in scores)
    assert scores[0]["overall"]["agreement"] == 1
    table = answer("eval", pair[0], "--text", tmp_path / "short.txt")
    assert "bits/B" in table
    assert "short" in table


def test_eval_of_files_with_one_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Check that both are scored, by their paths."""
    paths = [str(tmp_path / folder / "text.txt") for folder in "ab"]
    for path in paths:
        Path(path).parent.mkdir()
        Path(path).write_text(path)
    [score] = json.loads(answer("eval", pair[0], "--text", paths[0], "--text", paths[1], "--json"))
    assert [text["text"] for text in score["texts"]] == paths


def test_eval_bad_arguments(pair: tuple[Path, Path], transplanted: Path, tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xff")
    (tmp_path / "empty.txt").write_text("")
    for command in ("eval", "tokens"):
        folder = pair[0] if command == "eval" else transplanted
        assert "binary.txt cannot be read (not UTF-8)" in sentence(command, folder, "--text", tmp_path / "binary.txt")
    assert "The text empty is empty" in sentence("eval", pair[0], "--text", tmp_path / "empty.txt")
    assert "cannot read a tokenizer from" in sentence("eval", tmp_path)
    AutoTokenizer.from_pretrained(pair[0]).save_pretrained(tmp_path / "tokenizer")
    assert "cannot be loaded as a causal language model" in sentence("eval", tmp_path / "tokenizer")


def test_eval_reads_tokenizers_as_they_are_written(tmp_path: Path) -> None:
    """Transformers builds a tokenizer of its own for a qwen2 body, which reads SentencePiece tokens as nonsense."""
    tokenizer = sentencepiece_tokenizer(ENGLISH)
    folder = save(tmp_path / "model", make_model(tokenizer, architecture="qwen2"), tokenizer)
    (tmp_path / "text.txt").write_text(ENGLISH[0])
    [score] = json.loads(answer("eval", folder, "--text", tmp_path / "text.txt", "--json"))
    assert score["overall"]["tokens"] == len(tokenizer(ENGLISH[0], add_special_tokens=False).input_ids)


def test_doctor() -> None:
    text = answer("doctor")
    assert "PROBLEM" not in text
    assert "omp_slerp" in text
    assert "mergekit 0.1" in text
    assert all(check["ok"] for check in json.loads(answer("doctor", "--json")))


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", "0", "keeps torch from loading the plugin; unset it, or call"),
        ("MERGEKIT_OMP_CACHE_SIZE", "plenty", "'plenty' is not a size"),
    ],
)
def test_doctor_finds_problems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv("MERGEKIT_OMP_CACHE", str(tmp_path))
    monkeypatch.setenv(variable, value)
    result = call("doctor")
    assert result.exit_code == 1
    assert re.search(f"PROBLEM .*{expected}", result.stdout)


def test_help_is_fast() -> None:
    """Check that no large package is imported before a command runs."""
    code = "import mergekit_omp.cli.main, sys; print({'mergekit', 'rich', 'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help(command: str | None) -> None:
    """Check that every command and every option has a help text."""
    text = answer(*([command] if command else []), "--help")
    assert "Usage: " in text
    for line in re.findall(r"^  (-\S.*)$", text, flags=re.MULTILINE):
        assert re.search(r"\S {2,}\S", line) or line.strip().endswith(("PATH", "]")), line
