"""Sinks: what they are told is in their files, once, and a run that goes on goes on in them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from support import QUICK, REPOSITORY, compose_config, train_here
from tracked import csv_rows, step_rows, tensorboard_events, wandb_history, wandb_records

from lifealign.config import build
from lifealign.errors import UserError
from lifealign.evaluation.dashboard import focal_weights, show_task
from lifealign.evaluation.scores import ScoreBook
from lifealign.lifelong import Lifelong
from lifealign.objectives.components import DPO, FPO
from lifealign.runtime.options import SinkName, TrackingMode, TrackingOptions
from lifealign.runtime.sinks import CsvSink, series
from lifealign.runtime.tracking import Tracker

ALL = list(SinkName)
with_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")


def step(number: int, task: str, stage: str, **figures: float | None) -> dict[str, Any]:
    return {"step": number, "task": task, "task_number": 0, "stage": stage, "stage_step": number, "stage_steps": 9, **figures}


def factor(layer: int, rank: int, share: float) -> dict[str, Any]:
    where = {"task": "hc3", "stage": "sft", "factor": f"base_model.model.layers.{layer}.q_proj.lora_A.default.weight"}
    return {**where, "kept_rank": rank, "history_share": share, "singular_values": [2.0, 1.0]}


def record(tracker: Tracker, first: int = 1) -> None:
    """Three steps of two stages, a consolidation of two factors and an evaluation."""
    tracker.log("step", step(first, "hc3", "sft", loss=2.0))
    tracker.log("step", step(first + 1, "hc3", "preference", loss=0.5, focal_weight=0.25, gated_share=0.125))
    tracker.log("step", step(first + 2, "hc3", "preference", loss=math.inf, focal_weight=0.2, gated_share=0.25))
    tracker.log("consolidation", factor(0, 2, 0.25))
    tracker.log("consolidation", factor(1, 4, 0.75))
    tracker.log("evaluation", {"after": "hc3", "on": "hc3", "rouge_l": 40.0})


def tracker(folder: Path, *sinks: SinkName, **options: Any) -> Tracker:
    folder.mkdir(exist_ok=True)
    return Tracker(TrackingOptions(sinks=list(sinks), mode=TrackingMode.offline, **options), folder, {"seed": 3})


def two_tasks() -> ScoreBook:
    book = ScoreBook(["hc3", "safe_rlhf"])
    for after, on, value in ((0, 0, 40.0), (1, 0, 30.0), (1, 1, 50.0)):
        book.record("rouge_l", after, on, value)
    return book


# wandb


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that wandb can be told, told to an offline run."""
    folder = tmp_path_factory.mktemp("wandb") / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    with tracker(folder, SinkName.wandb, group="swept", log_adapter=True) as told:
        record(told)
        told.log("skipped", {**step(4, "hc3", "sft", loss=math.nan, skipped=1), "rows": ""})
        show_task(told, two_tasks(), FPO(), [{"task": "hc3", "margin": margin} for margin in (-1.0, 0.0, 1.0)])
        told.adapter(folder / "adapter")
    return folder


def test_wandb_has_each_step_once_under_its_task_and_stage(mirrored: Path) -> None:
    steps = [call for call in wandb_history(mirrored) if any(name.startswith("task/") for name in call)]
    assert [call["train/step"] for call in steps] == [1, 2, 3]
    assert [call.get("task/hc3/sft/loss") for call in steps] == [2.0, None, None]
    assert [call.get("train/preference/focal_weight") for call in steps] == [None, 0.25, 0.2]
    assert [call.get("task/hc3/preference/gated_share") for call in steps] == [None, 0.125, 0.25]
    assert "train/preference/loss" not in steps[2]  # what is no number is not sent


def test_wandb_knows_the_axes(mirrored: Path) -> None:
    metrics = [record.metric for record in wandb_records(mirrored) if record.WhichOneof("record_type") == "metric"]
    axes = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    assert axes["scores/*"] == "scores/tasks_trained"
    assert {axes[f"{name}/*"] for name in ("train", "task", "skipped", "evaluation", "consolidation")} == {"train/step"}
    names = {name.split("/")[0] for call in wandb_history(mirrored) for name in call if not name.startswith("_")}
    assert names <= {name.removesuffix("/*") for name in axes} | {"consolidation"}


def test_wandb_shows_consolidation_by_factor(mirrored: Path) -> None:
    (call,) = [call for call in wandb_history(mirrored) if "consolidation/sft/kept_rank" in call]
    assert (call["train/step"], call["consolidation/sft/kept_rank"], call["consolidation/sft/history_share"]) == (3, 3.0, 0.5)
    tables = {name: rows for name, rows in wandb_tables(mirrored).items() if name.startswith("consolidation")}
    factors = ["layers.0.q_proj.lora_A", "layers.1.q_proj.lora_A"]
    assert tables["consolidation/hc3/sft/kept_rank"] == [[factors[0], 2], [factors[1], 4]]
    assert tables["consolidation/hc3/sft/history_share"] == [[factors[0], 0.25], [factors[1], 0.75]]
    assert tables["consolidation/hc3/sft/singular_values"] == [[f, d, v] for f in factors for d, v in ((1, 2.0), (2, 1.0))]


def wandb_tables(folder: Path) -> dict[str, list[list[Any]]]:
    """Rows of each table by the name it was logged under, those behind a chart under the name of the chart."""
    found = {}
    for call in wandb_history(folder):
        for name, value in call.items():
            if isinstance(value, dict) and value.get("_type") == "table-file":
                (path,) = folder.glob(f"wandb/offline-run-*/files/{value['path']}")
                found[name.removesuffix("_table")] = json.loads(path.read_text())["data"]
    return found


def test_wandb_shows_the_scores_as_table_picture_and_curve(mirrored: Path) -> None:
    assert wandb_tables(mirrored)["tables/scores/rouge_l"] == [["hc3", 40.0, None], ["safe_rlhf", 30.0, 50.0]]
    (picture,) = [call["pictures/heatmap/rouge_l"] for call in wandb_history(mirrored) if "pictures/heatmap/rouge_l" in call]
    (path,) = mirrored.glob(f"wandb/offline-run-*/files/{picture['path']}")
    assert path.read_bytes().startswith(b"\x89PNG")
    (point,) = [call for call in wandb_history(mirrored) if "scores/tasks_trained" in call]
    expected = {"tasks_trained": 2, "rouge_l/hc3": 30.0, "rouge_l/safe_rlhf": 50.0, "rouge_l/last": 40.0, "rouge_l/bwt": -10.0}
    assert expected.items() <= {name.removeprefix("scores/"): value for name, value in point.items()}.items()


def test_wandb_shows_how_pairs_are_weighed(mirrored: Path) -> None:
    name = "histograms/focal_weight/hc3"
    (histogram,) = [call[name] for call in wandb_history(mirrored) if name in call]
    assert sum(histogram["values"]) == 3
    ends = focal_weights(FPO(), [1.0, -1.0])
    assert (histogram["bins"][0], histogram["bins"][-1]) == pytest.approx(ends)


def test_wandb_has_the_group_the_settings_and_the_adapter(mirrored: Path) -> None:
    records = list(wandb_records(mirrored))
    (run,) = [record.run for record in records if record.HasField("run")]
    assert run.run_group == "swept"
    assert {update.key: json.loads(update.value_json) for update in run.config.update}["seed"] == 3
    requests = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    artifacts = requests + [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    models = [artifact for artifact in artifacts if artifact.type == "model"]
    assert [[entry.path for entry in artifact.manifest.contents] for artifact in models] == [["adapter_model.safetensors"]]


def test_wandb_keeps_everything_in_the_run_directory(mirrored: Path) -> None:
    """Tables wait to be sent; the next run of a process has a place of its own."""
    assert list(mirrored.glob("wandb/artifacts/staging/*"))
    assert "WANDB_DATA_DIR" not in os.environ


def test_the_adapter_is_kept_on_request_only(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with tracker(tmp_path, SinkName.wandb) as told:
        record(told)
        told.adapter(tmp_path / "adapter")
    records = [record for record in wandb_records(tmp_path) if record.WhichOneof("record_type") == "artifact"]
    assert {record.artifact.type for record in records} == {"run_table"}


def test_offline_nothing_is_asked_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this process; wandb's own never learns of an account, since none is set."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    usual = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not str(address[0]).startswith("127."):
            raise AssertionError(f"asked {address}")
        usual(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    with tracker(tmp_path, SinkName.wandb) as told:
        record(told)
    assert wandb_history(tmp_path)


def test_focal_weights_by_hand() -> None:
    """(1 - sigmoid(r))^2: a quarter at 0; 0 where sigmoid(1) = 0.73 is above the threshold."""
    objective = FPO(gamma=2.0, confidence_threshold=0.7)
    assert focal_weights(objective, [0.0, 1.0, -1.0]) == pytest.approx([0.25, 0.0, (1 / (1 + math.exp(-1))) ** 2])


def test_the_workspace_draws_what_is_sent(mirrored: Path) -> None:
    """Each panel of docs/wandb_workspace.py names series of the sink, and the view can be written down without an account."""
    pytest.importorskip("wandb_workspaces")
    script = importlib.util.spec_from_file_location("wandb_workspace", REPOSITORY / "docs" / "wandb_workspace.py")
    assert script is not None and script.loader is not None
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    run = {"sequence": {"name": "two", "tasks": ["hc3", "safe_rlhf"]}, "evaluation": {"metrics": ["rouge_l"]}}
    view = module.workspace({**run, "tracking": {"project": "lifealign"}}, "someone")
    panels = [panel for section in view.sections for panel in section.panels]
    drawn = {name for panel in panels for name in (*getattr(panel, "y", ()), *getattr(panel, "media_keys", ()))}
    sent = {name for call in wandb_history(mirrored) for name in call}
    figures = {name for name in sent if name.split("/")[0] in ("task", "train", "evaluation", "pictures")} - {"train/step"}
    assert {getattr(name, "name", name) for name in drawn} >= figures - {"task/hc3/preference/gated_share"}
    assert {panel.x.name if hasattr(panel.x, "name") else panel.x for panel in panels if hasattr(panel, "x")} == {
        "train/step",
        "scores/tasks_trained",
    }


# TensorBoard


@with_tensorboard
def test_tensorboard_has_what_it_was_told(tmp_path: Path) -> None:
    with tracker(tmp_path, SinkName.tensorboard) as told:
        record(told)
        show_task(told, two_tasks(), FPO(), [{"task": "hc3", "margin": 1.0}])
    events = tensorboard_events(tmp_path)

    def points(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(name)]

    assert points("task/hc3/sft/loss") == [(1, 2.0)]
    assert points("train/preference/focal_weight") == [(2, 0.25), (3, pytest.approx(0.2))]
    assert points("consolidation/sft/kept_rank") == [(3, 3.0)]
    assert points("scores/rouge_l/hc3") == [(3, 30.0)]
    (picture,) = events.Images("heatmap/rouge_l")
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    (spectrum,) = events.Histograms("consolidation/hc3/sft/singular_values")
    assert (spectrum.histogram_value.num, spectrum.histogram_value.max) == (4, 2.0)
    (table,) = events.Tensors("scores/rouge_l/text_summary")
    assert b"| safe_rlhf | 30.0 | 50.0 |" in table.tensor_proto.string_val[0]


def test_tensorboard_missing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "tensorboard" else usual(name, *rest)  # noqa: E731
    monkeypatch.setattr("lifealign.runtime.options.find_spec", hidden)
    build(compose_config(*QUICK)).tracking.check()
    tracked = build(compose_config(*QUICK, "tracking.sinks=[csv,tensorboard]"))  # who reads such a run does not need it
    with pytest.raises(UserError, match=r"^tracking\.sinks: tensorboard is not installed; .*lifealign\[tensorboard\]"):
        tracked.tracking.check()


# CSV, and going on


def test_csv_has_the_steps_and_grows_by_columns(tmp_path: Path) -> None:
    with tracker(tmp_path, SinkName.csv) as told:
        told.rewind(0)
        record(told)
    assert csv_rows(tmp_path) == step_rows(tmp_path)
    assert [row.get("loss") for row in csv_rows(tmp_path)] == [2.0, 0.5, None]


@pytest.mark.parametrize("sink", [SinkName.csv, pytest.param(SinkName.tensorboard, marks=with_tensorboard)])
def test_steps_that_are_taken_again_are_there_once(tmp_path: Path, sink: SinkName) -> None:
    """Two steps stay; a third and a consolidation that began are void, and the run goes on from the second."""
    with tracker(tmp_path, sink) as told:
        told.rewind(0)
        told.log("step", step(1, "hc3", "sft", loss=3.0))
        told.log("step", step(2, "hc3", "sft", loss=2.0))
        checkpoint = told.position()
        told.log("step", step(3, "hc3", "sft", loss=7.0))
    with tracker(tmp_path, sink) as told:
        told.rewind(checkpoint)
        told.log("step", step(3, "hc3", "preference", loss=1.0, focal_weight=0.5))
    assert [row["loss"] for row in step_rows(tmp_path)] == [3.0, 2.0, 1.0]
    if sink is SinkName.csv:
        assert csv_rows(tmp_path) == step_rows(tmp_path)
    else:
        events = tensorboard_events(tmp_path)
        assert [(event.step, event.value) for event in events.Scalars("train/sft/loss")] == [(1, 3.0), (2, 2.0)]
        assert [(event.step, event.value) for event in events.Scalars("train/preference/loss")] == [(3, 1.0)]


@pytest.mark.parametrize("how", ["cut", "gone", "turned", "whole"])
def test_a_damaged_log_is_kept_aside_and_its_rows_are_taken_over(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "metrics.jsonl"
    with tracker(tmp_path, SinkName.csv) as told:
        told.rewind(0)
        for number in range(1, 4):
            told.log("step", step(number, "hc3", "sft", loss=1.0))
        checkpoint, digest = told.position(), told.digest()
        told.log("step", step(4, "hc3", "sft", loss=7.0))
    lines = log.read_bytes().splitlines(keepends=True)
    left = {
        "cut": lines[0] + lines[1][:9],
        "gone": b"",
        "turned": lines[0] + b"{" + lines[1] + lines[2],
        "whole": b"".join(lines),
    }
    log.write_bytes(left[how])
    with tracker(tmp_path, SinkName.csv) as told:
        told.rewind(checkpoint, digest)
        told.log("step", step(4, "hc3", "sft", loss=2.0))
    numbers = {"cut": [1, 4], "gone": [4], "turned": [1, 3, 4], "whole": [1, 2, 3, 4]}
    assert [row["step"] for row in step_rows(tmp_path)] == numbers[how]
    assert [row["step"] for row in csv_rows(tmp_path)] == numbers[how]
    assert ("metrics.jsonl is not what was written" in capsys.readouterr().out) == (how != "whole")
    if how != "whole":
        assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == left[how]


@with_tensorboard
def test_mode_disabled_leaves_out_wandb_alone(tmp_path: Path) -> None:
    with Tracker(TrackingOptions(sinks=ALL, mode=TrackingMode.disabled), tmp_path, {}) as told:
        told.rewind(0)
        record(told)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.csv", "tensorboard"}


def test_wandb_that_cannot_begin_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in, and nobody can be asked for a key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"tracking\.mode=online: wandb could not begin a run .*tracking\.mode=offline"):
        Tracker(TrackingOptions(sinks=[SinkName.wandb], mode=TrackingMode.online), tmp_path, {})


def test_a_picture_that_cannot_be_kept_is_told_with_the_next_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(ENOSPC, "no room")

    monkeypatch.setattr(CsvSink, "picture", full)
    with tracker(tmp_path, SinkName.csv) as told:
        told.picture("scores", b"")
        told.log("step", step(1, "hc3", "sft", loss=2.0))
        with pytest.raises(OSError, match="no room"):
            told.check()
    assert not step_rows(tmp_path)


def test_nobody_looks_at_pictures_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifealign.evaluation.dashboard.draw_heatmap", lambda *_: pytest.fail("drawn for nobody"))
    with tracker(tmp_path, SinkName.csv) as told:
        show_task(told, two_tasks(), DPO(), [])


def test_names_of_series() -> None:
    assert series(
        {"kind": "probe", "step": 4, "task": "hc3", "stage": "sft", "on": "instruct", "preference_accuracy": 50.0}
    ) == {"probe/instruct/preference_accuracy": 50.0}
    assert series({"kind": "reference", "task": "hc3", "pairs": 8}) == {"reference/hc3/pairs": 8}
    assert series({"kind": "skipped", "task": "hc3", "loss": None, "skipped": 2, "rows": ""}) == {"skipped/hc3/skipped": 2}


class Interrupted(Exception):
    """Stands for whatever ends a run."""


@with_tensorboard
def test_a_resumed_run_in_every_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended while its second stage is being saved, so that the steps of that stage are taken again."""
    save, told = Lifelong._save, "tracking.sinks=[wandb,tensorboard,csv]"
    options = (
        "sequence.tasks=[instruct]",
        "evaluation.metrics=[chosen_nll]",
        "data.max_train=8",
        "tracking.mode=offline",
        told,
    )

    def stop(self: Lifelong) -> None:
        if self.position.phase == "commit":
            raise Interrupted
        save(self)

    with monkeypatch.context() as stopped, pytest.raises(Interrupted):
        stopped.setattr(Lifelong, "_save", stop)
        train_here(tmp_path / "run", *options)
    before = [row["step"] for row in csv_rows(tmp_path / "run")]
    folder = train_here(tmp_path / "run", *options)

    steps = step_rows(folder)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1)) == before  # all were taken, some of them twice
    assert csv_rows(folder) == steps
    events = tensorboard_events(folder)
    for stage in ("sft", "preference"):
        own = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in steps if row["stage"] == stage]
        assert [(event.step, event.value) for event in events.Scalars(f"train/{stage}/loss")] == own
    history = [call["train/step"] for call in wandb_history(folder) if "train/preference/loss" in call]
    own = [row["step"] for row in steps if row["stage"] == "preference"]
    assert history == own + own  # wandb keeps both, in one run
    parts = [record.run for record in wandb_records(folder) if record.HasField("run")]
    assert [(part.run_id, part.resume) for part in parts] == [(parts[0].run_id, True)] * 2
    assert wandb_tables(folder).keys() >= {"tables/scores/chosen_nll"}
