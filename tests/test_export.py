"""``launch/export.py``: what it writes loads without this package, says the same as the run, and tells what it is."""

from __future__ import annotations

import json
import resource
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bases import ARCHITECTURES, random_base
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import QUICK, REPOSITORY, Ended, compose_config, end_here, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import lifealign.export.folder as folder_module
from lifealign.assets import TINY_MODEL
from lifealign.config import build, load_run
from lifealign.evaluation.scores import ScoreBook, closing_rows
from lifealign.export.card import Subject, _about, _loading, model_card
from lifealign.export.licences import data_source
from lifealign.export.markdown import escaped, fenced, table
from lifealign.export.reload import TOLERANCE, Reload, _refuse
from lifealign.models.options import BaseDtype, ModelOptions

WEIGHTS = "adapter_model.safetensors"


def export(run: Path, to: Path, *words: str) -> Ended:
    return end_here(
        lambda: runpy.run_path(str(REPOSITORY / "launch" / "export.py"), run_name="__main__"),
        *(str(run), "--to", str(to), *words),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, run) of a second architecture."""
    folder = tmp_path_factory.mktemp(request.param)
    base = random_base(folder / "base", request.param)
    settings = "model=custom", f"model.path={base}", "model.dtype=float32", "sequence.tasks=[instruct]", "sft.lr=0.02"
    return base, train_here(folder / "run", *settings, "evaluation.metrics=[preference_accuracy]")


def plain_logps(base: Path, folder: Path, predictions: Path, *, merged: bool, dtype: torch.dtype = torch.float32) -> None:
    """Load without lifealign and find the log-probabilities of the predictions file, from template text and logits alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder if merged else base, dtype=dtype)
    if not merged:
        model = PeftModel.from_pretrained(model, str(folder))
    model.eval()
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 8
    for row in rows:
        for answer in ("chosen", "rejected"):
            turns = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            turns.append({"role": "assistant", "content": row[answer]})
            whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
            before, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, whole[len(prompt) :]))
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([before + after])).logits[0].float()
            found = logits.log_softmax(-1)[len(before) - 1 : -1].gather(-1, torch.tensor(after)[:, None]).sum().item()
            allowed = 1e-3 if dtype == torch.float32 else 0.1 * len(after)
            assert found == pytest.approx(row[f"{answer}_logp"], abs=allowed)


# -- loads and says the same -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_the_bundled_model(run: Path, merge: bool, tmp_path: Path) -> None:
    beside = {tmp_path / "new.partial", tmp_path / "new.retired"}  # of the user, who may name folders so
    for folder in beside:
        folder.mkdir()
    ended = export(run, tmp_path / "new", *(["--merge"] if merge else []))
    assert (ended.code, ended.err) == (0, "")
    assert "loaded again" in ended.out
    held = {path.name for path in (tmp_path / "new").iterdir()}
    weights = {"model.safetensors", "config.json", "generation_config.json"} if merge else {WEIGHTS, "adapter_config.json"}
    assert held == {"README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", *weights}
    plain_logps(TINY_MODEL, tmp_path / "new", run / "tasks" / "02_hc3" / "predictions.jsonl", merged=merge)
    assert set(tmp_path.iterdir()) == {tmp_path / "new", *beside}
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("merge", [False, True])
def test_other_architectures(other: tuple[Path, Path], merge: bool, tmp_path: Path) -> None:
    base, run = other
    ended = export(run, tmp_path / "new", *(["--merge"] if merge else []))
    assert (ended.code, ended.err) == (0, "")
    plain_logps(base, tmp_path / "new", run / "tasks" / "01_instruct" / "predictions.jsonl", merged=merge)
    moved = float(ended.out.split("moves them by ")[1].split()[0])
    assert moved > 0.01, "an adapter that changes nothing would load alike from anywhere"
    if merge:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.use_cache, "it would decode without a cache"


@pytest.mark.parametrize("merge", [False, True])
def test_a_base_in_16_bit(merge: bool, tmp_path: Path) -> None:
    settings = "model.dtype=bfloat16", "sequence.tasks=[instruct]", "evaluation.metrics=[preference_accuracy]"
    run = train_here(tmp_path / "run", *settings)
    assert export(run, tmp_path / "new", *(["--merge"] if merge else [])).code == 0
    if merge:
        held = load_file(tmp_path / "new" / "model.safetensors")
        assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    else:
        assert {tensor.dtype for tensor in load_file(tmp_path / "new" / WEIGHTS).values()} == {torch.float32}
    predictions = run / "tasks" / "01_instruct" / "predictions.jsonl"
    plain_logps(TINY_MODEL, tmp_path / "new", predictions, merged=merge, dtype=torch.bfloat16)


def test_the_adapter_of_an_earlier_task(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "first", "--task", "instruct").code == 0
    assert export(run, tmp_path / "newest").code == 0
    first, newest = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "newest"))
    kept = load_file(run / "tasks" / "01_instruct" / "adapter" / WEIGHTS)
    assert all(first[name].equal(kept[name]) for name in kept)
    assert not all(first[name].equal(newest[name]) for name in kept)
    card = (tmp_path / "first" / "README.md").read_text()
    assert "after training through instruct" in card
    assert "BWT" not in card  # of the whole run, not of this adapter


# -- the check ---------------------------------------------------------------------------------------------------------


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def scaled(factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: 1.1 * factor if "lora_B" in name else factor for name, factor in factors.items()}


def emptied(factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(factor) for name, factor in factors.items()}


@pytest.mark.parametrize("change", [scaled, emptied])
def test_what_computes_something_else_is_not_handed_over(
    change: Callable[..., Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = folder_module._write

    def spoilt(folder: Path, *arguments: Any, **options: Any) -> None:
        write(folder, *arguments, **options)
        spoil(folder, change)

    monkeypatch.setattr(folder_module, "_write", spoilt)
    ended = export(run, tmp_path / "new")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "nats a token, more than the tolerance of 0.001" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_writes_something_else_is_not_handed_over(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = folder_module._write

    def spoilt(folder: Path, *arguments: Any, **options: Any) -> None:
        write(folder, *arguments, **options)
        template = folder / "chat_template.jinja"
        template.write_text("Well: " + template.read_text())

    monkeypatch.setattr(folder_module, "_write", spoilt)
    ended = export(run, tmp_path / "new")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "tokenizer" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_rounding_swallows_is_refused_though_the_tolerance_is_kept(run: Path) -> None:
    """0.02 nats are within bfloat16's 0.1; of an adapter that moves 0.01 they leave nothing. A fresh one loses nothing."""
    config = build(load_run(run))
    config.model.dtype = BaseDtype.bfloat16
    found = Reload(rows=3, drift=0.02, effect=0.01, tolerance=TOLERANCE[BaseDtype.bfloat16])
    with pytest.raises(ValueError, match=r"0\.02 nats a token, and the adapter itself moves them by 0\.01.*without --merge"):
        _refuse(found, 0.02, config, merge=True)
    _refuse(replace(found, effect=0.0), 0.02, config, merge=True)
    _refuse(replace(found, effect=0.2), 0.02, config, merge=True)
    with pytest.raises(ValueError, match="nan nats a token"):
        _refuse(replace(found, drift=float("nan")), 0.02, config, merge=True)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_says(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "new").code == 0
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    for cells in closing_rows(ScoreBook.from_json(json.loads((run / "scores.json").read_text()))):
        assert "| " + " | ".join(cells) + " |" in card
    scores = json.loads((run / "tasks" / "02_hc3" / "scores.json").read_text())["scores"]
    for task, values in scores.items():
        assert f"| {task} | {values['preference_accuracy']:.2f} |" in card
    assert card.index("| 1 | instruct |") < card.index("| 2 | hc3 |")
    assert "fpo (beta=0.1, gamma=2.0" in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["sft"] == yaml.safe_load((run / "config.yaml").read_text())["sft"]
    assert set(settings["sequence"]["sources"]) == {"instruct", "hc3"}
    assert "run" not in settings and str(run) not in card
    assert "base_model" not in metadata_load(tmp_path / "new" / "README.md"), "a folder is no name on the hub"


def test_the_card_says_how_wide_the_adapter_is(tmp_path: Path) -> None:
    """One of O-LoRA has a block of r for each task, and alpha goes along."""
    subject = Subject(tmp_path, tmp_path / "02_hc3", "title", merged=False, of_task=None)
    for strategy, wide in (("olora", "LoRA, r=16, alpha=32, on"), ("er", "LoRA, r=8, alpha=16, on")):
        assert wide in "\n".join(_about(subject, build(compose_config(*QUICK, f"strategy={strategy}"))))


def test_the_code_of_the_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in (("adapter", ()), ("merged", ("--merge",))):
        assert export(run, tmp_path / name, *words).code == 0
        code = (tmp_path / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["tokenizer"].chat_template
        assert names["model"].dtype is torch.float32


def test_the_code_of_the_card_passes_on_what_the_run_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    model = ModelOptions(path="~/base", trust_remote_code=True)
    for merged in (False, True):
        code = _loading(Subject(tmp_path, tmp_path / "02_hc3", "title", merged=merged, of_task=None), model)
        assert code.count("trust_remote_code=True") == 2
        assert (f"from_pretrained('{tmp_path / 'base'}'" in code) is not merged


@pytest.mark.parametrize(
    ("strategy", "said", "trained", "whole"),
    [
        ("stl", "aligned to one preference task alone", "on hc3 alone", False),
        ("mtl", "aligned to several preference tasks at once", "on all tasks at once", True),
    ],
)
def test_the_card_of_a_model_that_was_not_aligned_step_by_step(
    tmp_path: Path, strategy: str, said: str, trained: str, whole: bool
) -> None:
    """Where every task has a model of its own, the figures of the sequence are of no single one."""
    run = train_here(tmp_path / "run", f"strategy={strategy}", "sft.epochs=0", "evaluation.metrics=[preference_accuracy]")
    assert export(run, tmp_path / "x").code == 0
    card = (tmp_path / "x" / "README.md").read_text()
    assert said in card and ("| Metric | Last | BWT | AP |" in card) is whole
    assert f"| Trained | {trained};" in card and f"after training {trained}:" in card
    assert "one after another" not in card and "through" not in card and "joint" not in card


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside, this process can write no file of more bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("words", [(), ("--merge",)])
def test_what_does_not_fit_on_the_disk_is_told_and_leaves_nothing(run: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    with room_for(4096):
        ended = export(run, tmp_path / "x", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith(f"error: --to {tmp_path / 'x'}: cannot be written (") and "File too large" in ended.err
    assert list(tmp_path.iterdir()) == []


MARKUP = "a|b `c` *d* _e_ <img src=x onerror=y> [f](http://g) ![h](i) ~j~ $k$ &amp; \\| \n# l \x1b[31m"


def test_text_of_data_is_never_markup(run: Path) -> None:
    """A page made of such names holds them as text: no element but those of the card itself."""
    config = build(load_run(run))
    config.sequence.tasks = [MARKUP, "hc3"]
    config.sequence.name = config.model.path = config.data.root = MARKUP
    subject = Subject(run, run / "tasks" / "02_hc3", MARKUP, merged=False, of_task=None)
    settings = {"sequence": {"tasks": [MARKUP], "sources": {}}, "model": "```\n# out of the block"}
    page = model_card(subject, config, settings, Reload(3, 0.0, 0.1, 1e-3))
    tokens = MarkdownIt("commonmark").enable("table").parse(page.split("---\n", 2)[2])
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} == {"text", "link_open", "link_close"}  # the link is the card's own
    assert [child.attrs["href"] for child in inline if child.type == "link_open"] == ["https://arxiv.org/abs/2509.17183"]
    assert not [token for token in tokens if token.type == "html_block"]
    blocks = {token.info: token.content for token in tokens if token.type == "fence"}
    assert set(blocks) == {"python", "yaml"}
    assert "# out of the block" in blocks["yaml"]
    compile(blocks["python"], "card", "exec")
    heads = [token for token in tokens if token.type == "heading_open"]
    assert [head.tag for head in heads] == ["h1", "h2", "h2", "h2", "h2", "h2"]


def test_escaping_by_hand() -> None:
    """A line, a pipe that is no column, a tag that is none; a block whose text has a fence of three gets one of four."""
    assert escaped("a|b\n<c> `d`\x07") == r"a\|b \<c\> \`d\`"
    assert table(["x|y"], [["1\n2"]]) == "| x\\|y |\n| --- |\n| 1 2 |"
    assert fenced("```\nx\n```", "yaml") == "````yaml\n```\nx\n```\n````"


def test_licences(run: Path, tmp_path: Path) -> None:
    config = build(load_run(run))
    assert data_source("hc3", config) == ("the demonstration set that ships with lifealign", "Apache-2.0")
    config.data.hub = True
    assert data_source("hc3", config) == ("hub: Hello-SimpleAI/HC3", "CC-BY-SA-4.0")
    assert data_source("instruct", config) == ("hub: argilla/Capybara-Preferences", "not known")
    config.data.hub, config.data.root = False, str(tmp_path)
    assert data_source("hc3", config) == (f"files in {tmp_path}/hc3", "not known")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
    (tmp_path / "hc3").mkdir()
    assert data_source("hc3", config)[1] == "mit"
    (tmp_path / "hc3" / "README.md").write_text("---\nlicense: [cc-by-4.0, other]\n---\n")
    assert data_source("hc3", config)[1] == "cc-by-4.0, other"
    assert data_source("instruct", config)[1] == "mit"
    (tmp_path / "hc3" / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match="front matter"):
        data_source("hc3", config)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--task", "hc33"), "did you mean 'hc3'?"),
        (("--task",), "--task"),
    ],
)
def test_mistakes(words: tuple[str, ...], told: str, run: Path, tmp_path: Path) -> None:
    ended = export(run, tmp_path / "new", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert told in ended.err
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written(run: Path) -> None:
    ended = export(run, Path("/proc/nowhere/new"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "--to /proc/nowhere/new" in ended.err


def test_several_ranks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = export(run, tmp_path / "new")
    assert ended.code == 2
    assert "start it with python" in ended.err


def test_a_task_whose_scores_are_not_there_yet(run: Path, tmp_path: Path) -> None:
    unfinished = run / "tasks" / "02_hc3" / "scores.json"
    kept = unfinished.read_text()
    unfinished.unlink()
    ended = export(run, tmp_path / "new")
    unfinished.write_text(kept)
    assert ended.code == 2
    assert "interrupted" in ended.err
