"""The stability gap: probes of old tasks while a new one is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import train_here

from lifealign.evaluation.stability import stability


def probe(step: int, on: str, accuracy: float) -> dict[str, object]:
    return {"step": step, "on": on, "preference_accuracy": accuracy}


def test_by_hand() -> None:
    """a: 90, 50, 80, 85: worst 50 at step 12, end 85. b: 70, 75: worst 70, end 75. Means 60 and 80, gap 20."""
    taken = [
        probe(10, "a", 90),
        probe(12, "a", 50),
        probe(20, "a", 80),
        probe(20, "b", 70),
        probe(22, "a", 85),
        probe(22, "b", 75),
    ]
    found = stability(taken)
    assert found["tasks"] == {
        "a": {"worst": 50, "worst_step": 12, "end": 85},
        "b": {"worst": 70, "worst_step": 20, "end": 75},
    }
    assert (found["worst"], found["end"], found["gap"]) == (60, 80, 20)


def test_nothing_to_say_without_probes() -> None:
    assert stability([]) is None


def test_a_probe_whose_score_overflowed_is_left_out() -> None:
    taken = [probe(10, "a", 90), {**probe(12, "a", 0), "preference_accuracy": None}, probe(14, "a", 80)]
    assert stability(taken)["tasks"] == {"a": {"worst": 80, "worst_step": 14, "end": 80}}
    assert stability(taken[1:2]) is None


def test_probes_of_a_run(tmp_path: Path) -> None:
    """Two pairs of stages of two steps each, a probe before every step: only the second task's four look at the first.

    The first is taken before anything has changed, so it finds what the evaluation found after the first task.
    """
    few = ("sft.epochs=1", "preference.epochs=1", "evaluation.metrics=[preference_accuracy,mean_log_sigmoid]")
    run = train_here(tmp_path / "run", *few, "evaluation.probe_every=1")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    probes = [row for row in logged if row["kind"] == "probe"]
    steps = [row["step"] for row in logged if row["kind"] == "step" and row["task"] == "hc3"]
    assert [(row["task"], row["on"]) for row in probes] == [("hc3", "instruct")] * len(steps)
    assert [row["step"] + 1 for row in probes] == steps
    after = next(row for row in logged if row["kind"] == "evaluation" and row["after"] == row["on"] == "instruct")
    assert probes[0]["mean_log_sigmoid"] == pytest.approx(after["mean_log_sigmoid"], abs=1e-6)
    assert json.loads((run / "stability.json").read_text()) == stability(probes)
    assert (run / "report" / "stability.png").stat().st_size > 1000
    plain = train_here(tmp_path / "plain", *few)
    assert (plain / "adapter" / "adapter_model.safetensors").read_bytes() == (
        run / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert not (plain / "stability.json").exists()


def test_models_of_their_own_are_not_looked_at(tmp_path: Path) -> None:
    few = ("sft.epochs=1", "preference.epochs=0", "evaluation.metrics=[chosen_nll]", "evaluation.probe_every=1")
    run = train_here(tmp_path / "run", *few, "strategy=stl", "data.max_train=8", "data.max_eval=2")
    assert '"kind": "probe"' not in (run / "metrics.jsonl").read_text()
    assert not (run / "stability.json").exists()


def test_probes_need_no_preference_metric(tmp_path: Path) -> None:
    """Reference log-probabilities of the pairs that are looked at have not been asked for by the evaluation."""
    few = ("sft.epochs=1", "preference.epochs=0", "evaluation.metrics=[rouge_l]", "evaluation.max_new_tokens=2")
    run = train_here(tmp_path / "run", *few, "evaluation.probe_every=2", "evaluation.probe_pairs=3", "cache.enabled=false")
    assert json.loads((run / "stability.json").read_text())["tasks"].keys() == {"instruct"}
