"""What a run leaves, file by file, and that the files say what the run did."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support import QUICK, compose_config, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import lifealign.evaluation.evaluate
from lifealign.assets import TINY_MODEL
from lifealign.config import build, load_run, resolved
from lifealign.errors import UserError
from lifealign.evaluation import continual_metrics
from lifealign.evaluation.scores import format_score
from lifealign.lifelong import Lifelong
from lifealign.models.adapter import named_factors
from lifealign.models.loading import attach_lora, load_base
from lifealign.models.options import BaseDtype
from lifealign.runtime.engine import deepspeed_config
from lifealign.runtime.files import read_json_lines, write_json_lines
from lifealign.runtime.lock import locked

ONE_TASK = ("sequence.tasks=[instruct]", "evaluation.metrics=[chosen_nll]")
"""The first task of the run below: the same steps, the same adapter."""

METRICS = ["preference_accuracy", "reward_margin", "mean_log_sigmoid", "chosen_nll", "bleu4_char", "sacrebleu", "rouge_l"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(tmp_path_factory.mktemp("whole") / "run", "evaluation.forward=true")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(folder: Path, kind: str, **where: object) -> list[dict[str, Any]]:
    logged = lines(folder / "metrics.jsonl")
    return [row for row in logged if row["kind"] == kind and where.items() <= row.items()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def fresh_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter that a run started from, under the names of PEFT's files."""
    config = build(load_run(folder))
    base = load_base(config.model, deepspeed_config(config.zero))
    model = attach_lora(base, config.model.lora, seed=config.seed)
    return {name.replace(".default.", "."): p.detach().clone() for name, p in named_factors(model)}


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return math.sqrt(sum((left[name].double() - right[name].double()).square().sum().item() for name in left))


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(value.double().square().sum().item() for value in tensors.values()))


# -- files -------------------------------------------------------------------------------------------------------------


def test_config_is_resolved(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    assert "${" not in text
    assert "???" not in text
    held = yaml.safe_load(text)
    assert held == resolved(compose_config(*QUICK, "evaluation.forward=true", f"run.dir={run}"))
    assert held["objective"]["name"] == "fpo"
    assert held["strategy"]["name"] == "lifealign"
    assert held["resume"] == "auto"


def test_every_step_is_logged(run: Path) -> None:
    common = {"step", "task", "stage", "loss", "lr", "grad_norm", "pairs_per_second", "tokens_per_second"}
    preference = {"margin", "accuracy", "focal_weight", "gated_share", "chosen_reward", "rejected_reward"}
    steps = rows(run, "step")
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    for row in steps:
        assert common <= row.keys()
        assert row["stage"] == "sft" or preference <= row.keys()
        assert row["pairs_per_second"] > 0 < row["tokens_per_second"]
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert [(row["task"], row["stage"]) for row in steps if row["stage_step"] == 1] == [
        (task, stage) for task in ("instruct", "hc3") for stage in ("sft", "preference")
    ]
    for row in rows(run, "step", stage="preference"):
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5)
        assert 0 <= row["gated_share"] <= 1
        assert 0 < row["focal_weight"] < 1


def test_every_consolidation_is_logged_for_every_factor(run: Path) -> None:
    factors = {name.replace(".weight", ".default.weight") for name in adapter(run / "adapter")}
    for number, (task, stage) in enumerate((t, s) for t in ("instruct", "hc3") for s in ("sft", "preference")):
        records = rows(run, "consolidation", task=task, stage=stage)
        assert {row["factor"] for row in records} == factors
        assert len(records) == len(factors)
        for row in records:
            assert 1 <= row["kept_rank"] <= 8
            assert 0.9 <= row["kept_energy"] <= 1 + 1e-9
            assert row["history_share"] == 0 if number == 0 else 0 <= row["history_share"] <= 1
            assert 0 < row["refined_norm"] <= row["update_norm"] * (1 + 1e-6)
    assert max(row["history_share"] for row in rows(run, "consolidation", task="hc3")) > 0.01


def test_scores(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    assert list(scores) == ["tasks", "metrics", "strategy", "objective", "seed"]
    assert (scores["tasks"], scores["strategy"], scores["objective"], scores["seed"]) == (
        ["instruct", "hc3"],
        "lifealign",
        "fpo",
        0,
    )
    assert sorted(scores["metrics"]) == sorted(METRICS)
    for entry in scores["metrics"].values():
        assert set(entry) == {"matrix", "last", "bwt", "ap"}
        assert {k: entry[k] for k in ("last", "bwt", "ap")} == pytest.approx(continual_metrics(entry["matrix"]))


def test_forward_fills_the_upper_triangle(run: Path, tmp_path: Path) -> None:
    matrix = json.loads((run / "scores.json").read_text())["metrics"]["chosen_nll"]["matrix"]
    assert all(isinstance(value, float) for row in matrix for value in row)
    assert matrix[0][1] > matrix[1][1], "after the first task, the second was known as well as after its own training"
    assert {row["on"] for row in rows(run, "evaluation", after="instruct")} == {"instruct", "hc3"}


def test_each_task_leaves_its_folder(run: Path) -> None:
    assert sorted(path.name for path in (run / "tasks").iterdir()) == ["01_instruct", "02_hc3"]
    matrix = json.loads((run / "scores.json").read_text())["metrics"]
    for number, name in enumerate(("instruct", "hc3")):
        left = run / "tasks" / f"{number + 1:02d}_{name}"
        assert {path.name for path in left.iterdir()} == {"adapter", "predictions.jsonl", "scores.json"}
        scores = json.loads((left / "scores.json").read_text())
        assert scores["after"] == name
        for metric in METRICS:
            values = [scores["scores"][task][metric] for task in ("instruct", "hc3")]
            assert values == matrix[metric]["matrix"][number]
        predictions = lines(left / "predictions.jsonl")
        assert [row["task"] for row in predictions] == ["instruct"] * 8 + ["hc3"] * 8
        texts = {"task", "id", "prompt", "chosen", "rejected", "generation", "prediction"}
        keys = {*texts, "chosen_logp", "rejected_logp", "margin"}
        assert all(row.keys() == keys for row in predictions)
    final, last = adapter(run / "adapter"), adapter(run / "tasks" / "02_hc3" / "adapter")
    assert all(final[name].equal(last[name]) for name in final)
    assert all(value.dtype is torch.float32 for value in final.values())


def test_memory(run: Path) -> None:
    entries = json.loads((run / "memory" / "ledger.json").read_text())["entries"]
    assert [(e["name"], e["task"], e["stage"]) for e in entries] == [
        (f"{number:03d}_{task}_{stage}", task, stage)
        for number, (task, stage) in enumerate((t, s) for t in ("instruct", "hc3") for s in ("sft", "preference"))
    ]
    for entry in entries:
        held = load_file(run / "memory" / entry["name"] / "shard-0.safetensors")
        records = json.loads((run / "memory" / entry["name"] / "details.json").read_text())["factors"]
        assert held.keys() == {record["factor"] for record in records}
        for record in records:
            assert held[record["factor"]].norm().item() == pytest.approx(record["refined_norm"], rel=1e-5)


def test_texts_of_any_characters_are_read_back(tmp_path: Path) -> None:
    """What some call an end of a line, within a text."""
    rows = [{"response": f"a{end}b"} for end in "\n\r\v\x1c\x85\u2028\u2029"]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows


def test_report(run: Path) -> None:
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    pictures = {path.name for path in (run / "report").glob("*.png")}
    entries = [entry["name"] for entry in json.loads((run / "memory" / "ledger.json").read_text())["entries"]]
    assert pictures == {
        *(f"{kind}_{metric}.png" for kind in ("forgetting", "heatmap") for metric in METRICS),
        *("memory_kept_rank.png", "memory_conflict_share.png", *(f"memory_values_{name}.png" for name in entries)),
    }
    assert all((run / "report" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in pictures)


@pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
@pytest.mark.parametrize("size", browser.SIZES)
def test_the_report_in_a_browser(run: Path, size: str) -> None:
    """Every score of scores.json is in its cell, every picture is drawn, nothing fails and nothing sticks out."""
    page = run / "report" / "index.html"
    with browser.browser() as driver:
        browser.show(driver, page, size)
        cells = driver.execute_script(
            "return [...document.querySelectorAll('figure .heat')].map(table => [...table.rows].slice(1)"
            ".map(row => [...row.cells].slice(1).map(cell => cell.innerText)))"
        )
        widths = driver.execute_script("return [...document.images].map(image => image.complete && image.naturalWidth)")
        closing = driver.execute_script("return document.querySelector('table').innerText")
        assert browser.troubles(driver) == []
        assert browser.overflow(driver) == 0
    scores = json.loads((run / "scores.json").read_text())["metrics"]
    assert len(cells) == len(scores)
    for shown, entry in zip(cells, scores.values(), strict=True):
        for texts, values in zip(shown, entry["matrix"], strict=True):
            for text, value in zip(texts, values, strict=True):
                assert float(text) == pytest.approx(value, abs=0.501 * 10 ** -len(text.partition(".")[2]))
        for key in ("last", "bwt", "ap"):
            assert format_score(entry[key]) in closing
    assert len(widths) == len(METRICS) + 4 and all(widths)  # forgetting curves, spectra


def test_the_browser_test_would_notice(tmp_path: Path) -> None:
    if browser.missing() is not None:
        pytest.skip(str(browser.missing()))
    page = tmp_path / "page.html"
    page.write_text("<script>fail()</script><img src='file:///nowhere.png'><div style='width: 2000px'>wide</div>")
    with browser.browser() as driver:
        browser.show(driver, page, "phone")
        assert "fail is not defined" in "\n".join(found := browser.troubles(driver)) and len(found) >= 2
        assert browser.overflow(driver) > 0


def test_nothing_half_written_is_left(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "lock", "metrics.jsonl", "run.log", "scores.json"),
        *("adapter", "checkpoints", "memory", "report", "tasks"),
    }
    assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".retired")]
    assert len(list((run / "checkpoints").glob("0*"))) == 2  # checkpoint.keep


def test_a_link_in_the_place_of_the_lock_leads_nowhere(tmp_path: Path) -> None:
    """Neither is the file that it points to emptied, nor one made where there is none."""
    folder, precious = tmp_path / "run", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("three years")
    for target in (precious, tmp_path / "nowhere"):
        (folder / "lock").unlink(missing_ok=True)
        (folder / "lock").symlink_to(target)
        with pytest.raises(UserError, match=r"run/lock: is a symbolic link; "):
            train_here(folder)
    assert precious.read_text() == "three years" and {path.name for path in tmp_path.iterdir()} == {"run", "precious"}


def test_a_lock_leaves_what_its_file_holds(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("mine")
    with locked(tmp_path, "held"):
        pass
    assert (tmp_path / "lock").read_text() == "mine"


# -- what the files say ------------------------------------------------------------------------------------------------


def test_the_adapter_is_its_start_plus_the_memory(run: Path) -> None:
    expected = {name: value.double() for name, value in fresh_adapter(run).items()}
    for entry in json.loads((run / "memory" / "ledger.json").read_text())["entries"]:
        for name, update in load_file(run / "memory" / entry["name"] / "shard-0.safetensors").items():
            expected[name.replace(".default.", ".")] += update.double()
    found = adapter(run / "adapter")
    assert found.keys() == expected.keys()
    for name in found:
        # four additions, each rounded to float32
        torch.testing.assert_close(found[name].double(), expected[name], rtol=4 * 2**-23, atol=1e-9)


def test_plain_peft_opens_the_adapter_and_gives_the_log_probabilities_that_were_reported(run: Path) -> None:
    """Tokens and log-probabilities are found here from the template's text and the model's logits alone."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()

    def logp(question: str, answer: str) -> float:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": answer})
        whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(prompt) :]))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + after])).logits[0].double()
        tokens = logits.log_softmax(-1)[len(before) - 1 : -1].gather(-1, torch.tensor(after)[:, None])
        return tokens.sum().item()

    predictions = lines(run / "tasks" / "02_hc3" / "predictions.jsonl")
    assert len(predictions) == 16
    for row in predictions:
        assert logp(row["prompt"], row["chosen"]) == pytest.approx(row["chosen_logp"], abs=1e-3)
        assert logp(row["prompt"], row["rejected"]) == pytest.approx(row["rejected_logp"], abs=1e-3)


@pytest.mark.parametrize(("objective", "loss"), [("fpo", 0.25 * math.log(2)), ("dpo", math.log(2))])
def test_the_first_preference_step_of_a_fresh_adapter(objective: str, loss: float, tmp_path: Path) -> None:
    """Policy and reference agree, so r = 0: -(1 - 1/2)^2 log(1/2) = 0.1733 with gamma = 2, and log 2 = 0.6931 with DPO."""
    folder = train_here(tmp_path / "run", *ONE_TASK, "sft.epochs=0", f"objective={objective}")
    first = rows(folder, "step")[0]
    assert first["stage"] == "preference"
    assert first["loss"] == pytest.approx(loss, abs=1e-4)
    assert first["focal_weight"] == pytest.approx(0.25 if objective == "fpo" else 1)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert first["grad_norm"] > 0


def test_the_concatenated_layout_ends_in_the_same_adapter(run: Path, tmp_path: Path) -> None:
    folder = train_here(tmp_path / "run", *ONE_TASK, "model.row_layout=concatenated")
    expected = adapter(run / "tasks" / "01_instruct" / "adapter")
    assert distance(adapter(folder / "adapter"), expected) < 1e-4 * norm(expected)
    # the layouts did differ: a shared prompt is counted once
    ratio = [
        row["tokens_per_second"] / row["pairs_per_second"]
        for where in (folder, run)
        for row in rows(where, "step", task="instruct", stage="preference")[:1]
    ]
    assert ratio[0] > ratio[1]


def test_gradient_checkpointing_changes_nothing_but_memory(run: Path, tmp_path: Path) -> None:
    folder = train_here(tmp_path / "run", *ONE_TASK, "model.gradient_checkpointing=true")
    found, expected = rows(folder, "step"), rows(run, "step", task="instruct")
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_recomputes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would pass for an option that does nothing."""
    calls = 0
    usual = torch.utils.checkpoint.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return usual(*arguments, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    train_here(tmp_path / "run", *ONE_TASK, "model.gradient_checkpointing=true", "preference.epochs=0", "data.max_train=8")
    assert calls > 0


@pytest.mark.slow
def test_small_steps_are_not_lost_under_a_bf16_base(tmp_path: Path) -> None:
    """A hundred steps at 5e-6 move the adapter as far as under a float32 base: the adapter is float32 throughout."""
    moved = {}
    for dtype in BaseDtype:
        folder = train_here(
            tmp_path / dtype.value,
            *("sequence.tasks=[hc3]", "evaluation.metrics=[chosen_nll]", "data.max_train=8", "data.max_eval=2"),
            *("sft.epochs=100", "preference.epochs=0", "sft.lr=5e-6", "sft.warmup_share=0", "sft.micro_batch_size=8"),
            *("strategy=seqft", f"model.dtype={dtype.value}", "data.max_prompt_tokens=16", "data.max_response_tokens=16"),
        )
        assert len(rows(folder, "step")) == 100
        held = adapter(folder / "adapter")
        assert all(value.dtype is torch.float32 for value in held.values())
        moved[dtype] = distance(held, fresh_adapter(folder))
    assert moved[BaseDtype.bfloat16] == pytest.approx(moved[BaseDtype.float32], rel=0.05)
    assert moved[BaseDtype.float32] > 1e-3


# -- stopped and started -----------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for whatever ends a run."""


def interrupt(monkeypatch: pytest.MonkeyPatch, *, after_saving: bool) -> None:
    """The next run ends at its first checkpoint: when it stands, or just before it is written."""
    save = Lifelong._save

    def stop(self: Lifelong) -> None:
        if after_saving:
            save(self)
        raise Interrupted

    monkeypatch.setattr(Lifelong, "_save", stop)


def test_a_run_that_ended_before_its_first_checkpoint_is_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped, pytest.raises(Interrupted):
        interrupt(stopped, after_saving=False)
        train_here(tmp_path / "run", *ONE_TASK)
    train_here(tmp_path / "run", *ONE_TASK)
    steps = [row["step"] for row in rows(tmp_path / "run", "step")]
    assert steps == list(range(1, len(steps) + 1))


def test_wandb_mirrors_a_run_offline_and_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as stopped, pytest.raises(Interrupted):
        interrupt(stopped, after_saving=True)
        train_here(tmp_path / "run", *ONE_TASK, "data.max_train=8", "tracking.mode=offline")
    kept = json.loads((tmp_path / "run" / "tracking.json").read_text())
    train_here(tmp_path / "run", *ONE_TASK, "data.max_train=8", "tracking.mode=offline")
    assert json.loads((tmp_path / "run" / "tracking.json").read_text()) == kept
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    for mirrored in folders:
        assert f"-{kept['wandb_id']}" in mirrored.name  # wandb appends -1 to the second of one second
        records = mirrored / f"run-{kept['wandb_id']}.wandb"
        deadline = time.monotonic() + 20  # wandb writes from a process of its own
        while not (records.exists() and records.stat().st_size > 1000) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert records.stat().st_size > 1000, sorted(path.name for path in mirrored.rglob("*"))
    assert folders
    assert not (tmp_path / "wandb").exists()


def test_a_policy_that_overflows_on_a_held_out_pair_is_scored_with_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a base in half precision may. The run comes to its end, and every file that it writes is JSON."""
    usual = lifealign.evaluation.evaluate.score_pairs

    def overflown(*args: object, **options: object) -> torch.Tensor:
        logps = usual(*args, **options)
        logps[0] = math.nan
        return logps

    monkeypatch.setattr(lifealign.evaluation.evaluate, "score_pairs", overflown)
    metrics = "evaluation.metrics=[preference_accuracy,rouge_l]"
    folder = train_here(tmp_path / "run", metrics, "sequence.tasks=[instruct]", "tracking.mode=offline")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    scores = json.loads((folder / "tasks" / "01_instruct" / "scores.json").read_text(), parse_constant=refuse)["scores"]
    assert scores["instruct"]["preference_accuracy"] is None and scores["instruct"]["rouge_l"] is not None
    lines = (folder / "tasks" / "01_instruct" / "predictions.jsonl").read_text().splitlines()
    margins = [json.loads(line, parse_constant=refuse)["margin"] for line in lines]
    assert margins[0] is None and None not in margins[1:]
