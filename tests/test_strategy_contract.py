"""What every registered strategy must do, whatever its method: survive a resume, agree on two ranks, start as seqft does.

The file is its own worker: ``deepspeed --num_gpus 2 tests/test_strategy_contract.py FOLDER`` runs every case in two ranks, in
one launch, into FOLDER.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from safetensors.torch import load_file
from support import command, compose_config, train_here

import lifealign.strategies  # noqa: F401  registers them
from lifealign.command import without_local_rank
from lifealign.config import build, resolved
from lifealign.errors import UserError
from lifealign.lifelong import Lifelong
from lifealign.registry import component
from lifealign.runtime import checkpoint, distributed
from lifealign.runtime.options import TrackingMode, TrackingOptions
from lifealign.runtime.tracking import Tracker

pytestmark = pytest.mark.timeout(900)  # one launch runs all cases on two ranks

NAMES = sorted(name.removesuffix(".yaml") for name in ConfigStore.instance().repo["schema"]["strategy"])

OPTIONS: dict[str, tuple[str, ...]] = {
    "kl": ("strategy.max_new_tokens=6",),
    "lifealign": ("strategy.buffer_fraction=0.5",),
    "er": ("strategy.buffer=reservoir", "strategy.buffer_size=5"),
    "lwf": ("strategy.strength=100",),
    "cppo": ("strategy.retention=100",),
}
"""What makes a strategy quick, or lets it do more on a dozen pairs than its defaults would."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "gem_released": ("strategy=gem_released",),
    "ewc_released": ("strategy=ewc_released", "strategy.mode=online"),
    "task_vectors": ("strategy=wise", "strategy.average=task_vectors"),
    "cppo_learned": ("strategy=cppo", "strategy.weighting=learned", "strategy.retention=100"),
    "l2p_diversity": ("strategy=l2p", "strategy.diversity=1"),
}
"""Options under which a strategy keeps a state of another kind."""

CASES = (*NAMES, *VARIANTS)

COMMON = (
    "data.max_train=11",  # a last batch of 3 pairs: with micro-batches of 4, the second rank's share is empty
    "data.max_eval=4",
    "sft.epochs=1",
    "preference.epochs=1",
    "objective=dpo",
    "evaluation.metrics=[mean_log_sigmoid,chosen_nll]",
    "cache.enabled=false",
)

STARTS_AS_SEQFT = {"er", "ewc", "gem", "agem", "cppo", "kl", "lwf", "stl"}
"""Strategies that have nothing to say before there is a past: after one task their adapter is seqft's."""

Tensors = dict[str, torch.Tensor]


def overrides(name: str) -> tuple[str, ...]:
    return (*COMMON, *(VARIANTS[name] if name in VARIANTS else (f"strategy={name}", *OPTIONS.get(name, ()))))


def two_rank_overrides(name: str) -> tuple[str, ...]:
    """The same global batches, with gradients and optimiser state partitioned."""
    return (*overrides(name), "zero=2")


def weights(folder: Path) -> Tensors:
    """All that an adapter's folder holds."""
    return {f"{path.name}/{key}": t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def distance(found: Tensors, expected: Tensors) -> float:
    """Frobenius norm of the difference over all tensors, as a share of that of ``expected``."""
    assert found.keys() == expected.keys()
    off = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    return float((off / sum(value.double().square().sum() for value in expected.values())).sqrt())


def learned(folder: Path) -> Tensors:
    """The weights that start at zero, or that a strategy adds: what training has moved, and not where A was drawn."""
    return {name: t for name, t in weights(folder).items() if "lora_A" not in name}


def undated(values: Any) -> Any:
    """A strategy's values; in a ledger, which is a list of mappings, without the dates."""
    for entry in values.get("memory", ()):
        if isinstance(entry, dict):
            entry["date"] = entry["seal"] = ""
    return values


def state(run: Path) -> tuple[Any, Tensors]:
    """What the strategy left in a finished run's last checkpoint; of the ledger all but the dates, which its seals cover."""
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return undated(found.state["strategy"]), {k: v for k, v in found.tensors.items() if k.startswith("strategy/")}


if __name__ == "__main__":
    for strategy in CASES:
        train_here(Path(without_local_rank(sys.argv[1:])[0]) / strategy, *two_rank_overrides(strategy))
    distributed.stop()
    sys.exit()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    ended = command("deepspeed", "--num_gpus", "2", __file__, str(folder), timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process, made as they are asked for."""

    class Runs(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = train_here(tmp_path_factory.mktemp("whole") / name, *overrides(name))
            return self[name]

    return Runs()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_as_good_as_one(name: str, whole: dict[str, Path], two_ranks: Path) -> None:
    """Sums over ranks round differently, and AdamW's first steps take the sign of gradients that are nearly zero.

    So the distance is held against what the strategy itself does, its distance from sequential training: a sample or a
    mean that depends on the split would change a good part of that.
    """
    one, two = (learned(folder / "adapter") for folder in (whole[name], two_ranks / name))
    off = distance(two, one)
    assert off < 5e-3
    plain = learned(whole["seqft"] / "adapter")
    if name != "seqft" and {key: t.shape for key, t in plain.items()} == {key: t.shape for key, t in one.items()}:
        assert off < 0.05 * distance(plain, one)


def stopping_after(save: Callable[..., None], calls: int) -> Callable[..., None]:
    """A method that saves, and ends the run the last of so many times."""
    done = []

    def save_and_stop(self: Lifelong, *args: object) -> None:
        save(self, *args)
        done.append(None)
        if len(done) == calls:
            raise KeyboardInterrupt

    return save_and_stop


QUICK_TO_RESUME = ("lifealign", "l2p", "olora")
"""A state of the ledger, of added weights and of further adapters; the others are in the longer suite."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK_TO_RESUME else pytest.mark.slow) for n in CASES])
def test_resumed_equals_uninterrupted(
    name: str, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second task (in the first, where there is only one), between its stages and again in the middle
    of the second stage: the same to the bit."""
    phases = len(list((whole[name] / "tasks").iterdir())) * 3
    for method, calls in (("_save", phases - 2), ("_save_midway", 1)):
        monkeypatch.setattr(Lifelong, method, stopping_after(getattr(Lifelong, method), calls))
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path / "run", *overrides(name), "checkpoint.every=1")
        monkeypatch.undo()
    train_here(tmp_path / "run", *overrides(name))
    expected, found = weights(whole[name] / "adapter"), weights(tmp_path / "run" / "adapter")
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    assert (tmp_path / "run" / "scores.json").read_text() == (whole[name] / "scores.json").read_text()
    (values, tensors), (expected_values, expected_tensors) = state(tmp_path / "run"), state(whole[name])
    assert values == expected_values
    assert tensors.keys() == expected_tensors.keys()
    assert all(tensors[key].equal(expected_tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
def test_state_comes_back_as_it_was_saved(name: str, whole: dict[str, Path]) -> None:
    composed = compose_config("+sequence=six_domains", *QUICK_TASKS, *overrides(name))
    distributed.start()
    with Tracker(TrackingOptions(mode=TrackingMode.disabled), whole[name], {}) as tracker:
        lifelong = Lifelong(build(composed), whole[name], tracker, resolved(composed))
        lifelong._restore()
    again = lifelong.strategy.state_dict()
    values, tensors = state(whole[name])
    assert undated(json.loads(json.dumps(again.values))) == values
    assert {f"strategy/{key}" for key in again.tensors} == tensors.keys()
    assert all(again.tensors[key].equal(tensors[f"strategy/{key}"]) for key in again.tensors)


QUICK_TASKS = ("sequence.tasks=[instruct,hc3]",)


@pytest.mark.parametrize("name", sorted(STARTS_AS_SEQFT))
def test_the_first_task_is_that_of_seqft(name: str, whole: dict[str, Path]) -> None:
    first = "tasks/01_instruct/adapter"
    expected, found = weights(whole["seqft"] / first), weights(whole[name] / first)
    assert all(found[key].equal(expected[key]) for key in expected)


def test_lifealign_that_keeps_everything_starts_as_seqft(tmp_path: Path, whole: dict[str, Path]) -> None:
    """θ = 1 truncates nothing and in the first stage nothing lies in the past; W_0 + (W_1 − W_0) rounds."""
    run = train_here(
        tmp_path / "run",
        *COMMON,
        "strategy=lifealign",
        "strategy.denoise_energy=1",
        "strategy.projection_scale=1",
        "sequence.tasks=[instruct]",
    )
    assert distance(weights(run / "adapter"), weights(whole["seqft"] / "tasks/01_instruct/adapter")) < 1e-5


def test_joint_training_of_one_task_is_that_task(tmp_path: Path, whole: dict[str, Path]) -> None:
    run = train_here(tmp_path / "run", *overrides("mtl"), "sequence.tasks=[instruct]")
    assert distance(weights(run / "adapter"), weights(whole["seqft"] / "tasks/01_instruct/adapter")) == 0


def test_each_model_of_stl_is_scored_on_its_own_task(whole: dict[str, Path]) -> None:
    """Last is the mean over own models; the model of the second task is that of a run that never met the first."""
    entry = json.loads((whole["stl"] / "scores.json").read_text())["metrics"]["chosen_nll"]
    (first, nothing), (again, second) = entry["matrix"]
    assert nothing is None
    assert again == first
    assert entry["last"] == pytest.approx((first + second) / 2)
    assert entry["bwt"] == 0


def test_scores_of_tasks_to_come_do_not_replace_those_of_own_models() -> None:
    """Row i holds what model i says of tasks after its own; the rows below keep each task's own score."""
    plan = component("strategy", "stl")().plan([SimpleNamespace()] * 3)
    filled = [(list(rows), on) for experience in plan for on, rows in experience.scores(3, forward=True)]
    assert filled == [([0, 1, 2], 0), ([0], 1), ([0], 2), ([1, 2], 1), ([1], 2), ([2], 2)]


@pytest.mark.parametrize("name", ["stl", "mtl"])
def test_a_task_added_to_a_finished_run(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole[name], tmp_path / "run"))
    more = (*overrides(name), "sequence.tasks=[instruct,hc3,truthfulqa]", "resume=force")
    if name == "mtl":
        with pytest.raises(UserError, match=r"sequence\.tasks: strategy=mtl trains on all of its tasks at once"):
            train_here(run, *more)
        return
    before = json.loads((run / "scores.json").read_text())["metrics"]["chosen_nll"]["matrix"][-1]
    train_here(run, *more)
    assert json.loads((run / "scores.json").read_text())["metrics"]["chosen_nll"]["matrix"][-1][:2] == before[:2]


def test_joint_training_has_a_last_row_alone(whole: dict[str, Path]) -> None:
    entry = json.loads((whole["mtl"] / "scores.json").read_text())["metrics"]["chosen_nll"]
    assert entry["matrix"][0] == [None, None]
    assert entry["last"] == pytest.approx(sum(entry["matrix"][1]) / 2)
    assert entry["bwt"] is None


WHOLE = {"ewc", "gem", "agem", "l2p", "olora", "cppo", "kl", "lwf"}
"""Those that docs/strategies.md says refuse zero=3."""


@pytest.mark.parametrize("name", NAMES)
def test_partitioned_weights_are_refused_with_the_reason(name: str) -> None:
    composed = compose_config("+sequence=six_domains", f"strategy={name}", "zero=3")
    if name not in WHOLE:
        build(composed)
        return
    with pytest.raises(UserError, match=rf"strategy={name} does not run with zero=3: .+; use zero=2"):
        build(composed)
