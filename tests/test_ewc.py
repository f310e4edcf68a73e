"""Elastic weight consolidation: its Fisher information, its penalties added up, and what they do to a second task."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import QUICK, compose_config, train_here
from torch.nn.functional import logsigmoid

from lifealign.config import build, resolved
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.lifelong import Lifelong
from lifealign.objectives import IPO
from lifealign.runtime import distributed
from lifealign.runtime.tracking import Tracker
from lifealign.stages import PreferenceStage
from lifealign.strategies.ewc import ElasticWeightConsolidation, Mode, Quadratic, with_likelihoods
from lifealign.strategies.gradients import mean_squared_gradient, unflatten

ONE_TASK = (
    "sequence.tasks=[instruct]",
    "data.max_train=4",
    "data.max_eval=2",
    "sft.epochs=1",
    "preference.epochs=1",
    "objective.beta=1.0",  # at 0.1 the preference stage would be a 400th of the Fisher information
    "evaluation.metrics=[preference_accuracy]",
)
"""One optimiser step a stage, on four pairs; objective=fpo."""


def run_here(folder: Path, *overrides: str) -> Lifelong:
    """A run in this process, and all that it leaves in memory."""
    composed = compose_config(*QUICK, *ONE_TASK, f"run.dir={folder}", *overrides)
    config, settings = build(composed), resolved(composed)
    distributed.start()
    folder.mkdir(parents=True)
    with Tracker(config.tracking, folder, settings) as tracker:
        lifelong = Lifelong(config, folder, tracker, settings)
        lifelong.run()
    return lifelong


def adapter(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "adapter_model.safetensors").items())])


def steps(folder: Path) -> list[dict]:
    return [row for line in (folder / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == "step"]


@pytest.fixture(scope="module")
def seqft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(tmp_path_factory.mktemp("seqft") / "run", *ONE_TASK, "strategy=seqft")


@pytest.fixture(scope="module")
def ewc(tmp_path_factory: pytest.TempPathFactory) -> Lifelong:
    return run_here(tmp_path_factory.mktemp("ewc") / "run", "strategy=ewc")


# Fisher information


def logp(lifelong: Lifelong, prompt: list[int], response: list[int]) -> torch.Tensor:
    """From the model's own logits over one line without padding: none of the framework's batches and heads."""
    ids = torch.tensor([[*prompt, *response]])
    logits = lifelong.policy.base(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()


def log_likelihood(lifelong: Lifelong, stage: str, pair: Pair) -> torch.Tensor:
    """log p(chosen) in SFT; log sigmoid(r) in the preference stage, also with the focal objective."""
    if stage == "sft":
        return logp(lifelong, pair.prompt, pair.chosen)
    sides = (pair.chosen, pair.rejected)
    with torch.no_grad(), lifelong.policy.without_adapter():
        reference = [logp(lifelong, pair.prompt, side) for side in sides]
    chosen, rejected = (logp(lifelong, pair.prompt, side) - base for side, base in zip(sides, reference, strict=True))
    return logsigmoid(lifelong.config.objective.beta * (chosen - rejected))


@pytest.fixture(scope="module")
def fishers(ewc: Lifelong) -> dict[str, torch.Tensor]:
    """Of each stage, float64: the mean over the task's pairs of squared gradients, a pair at a time, by ``backward``; SFT's
    over the mean number of tokens of a chosen response, since its loss is a mean over tokens."""
    parameters = [p for p in ewc.policy.parameters() if p.requires_grad]
    pairs, found = ewc.tasks[0].train, {}
    for stage in ("sft", "preference"):
        found[stage] = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for pair in pairs:
            log_likelihood(ewc, stage, pair).backward()
            found[stage] += torch.cat([p.grad.double().flatten() for p in parameters]).square() / len(pairs)
            ewc.policy.zero_grad()
    found["sft"] /= sum(len(pair.chosen) for pair in pairs) / len(pairs)
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-3


def test_fisher_information_is_that_of_both_stages_likelihoods_pair_by_pair(
    ewc: Lifelong, fishers: dict[str, torch.Tensor]
) -> None:
    """At the end of the task, with the plain likelihood in place of the focal loss, against autograd from raw logits."""
    assert fishers["preference"].norm() > 1e-2 * fishers["sft"].norm()  # leaving it out would show
    assert_close(ewc.strategy.penalty.importance, fishers["sft"] + fishers["preference"])


def test_ipos_information_is_that_of_its_regression_whatever_the_residual(ewc: Lifelong) -> None:
    """2 (grad h)^2 with h the log-ratio difference, against autograd from raw logits."""
    run, pairs, parameters = ewc.run_info, ewc.tasks[0].train, list(ewc.run_info.trained().values())
    expected = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for pair in pairs:
        h = logp(ewc, pair.prompt, pair.chosen) - logp(ewc, pair.prompt, pair.rejected)  # the reference is a constant
        gradients = torch.autograd.grad(h, parameters)
        expected += 2 * torch.cat([g.double().flatten() for g in gradients]).square() / len(pairs)
    stages = {**run.stages, "preference": PreferenceStage(IPO(beta=0.1), ewc.reference)}
    likelihood = with_likelihoods(replace(run, stages=stages))
    assert_close(mean_squared_gradient(likelihood, "preference", pairs, parameters), expected)


def test_a_stage_that_is_skipped_has_no_part(ewc: Lifelong, fishers: dict[str, torch.Tensor]) -> None:
    strategy = ElasticWeightConsolidation()
    strategy.setup(ewc.run_info)
    strategy.end_stage(ewc._context(0, "preference"))
    assert not strategy.loss_terms(ewc._context(0))  # nothing is held before the task ends
    resumed = ElasticWeightConsolidation()
    resumed.setup(ewc.run_info)
    resumed.load_state_dict(strategy.state_dict())  # between the stage and the end of the task
    resumed.end_task(ewc._context(0))
    assert_close(resumed.penalty.importance, fishers["preference"])


def test_the_released_codes_settings_hold_the_last_stage_alone(ewc: Lifelong, fishers: dict[str, torch.Tensor]) -> None:
    """SFT is registered when it ends, so the preference stage is held already; decay 0 then leaves nothing of SFT."""
    strategy = build(compose_config(*QUICK, "strategy=ewc_released")).strategy
    assert (strategy.strength, strategy.mode, strategy.decay) == (0.1, Mode.online, 0.0)
    strategy.setup(ewc.run_info)
    for stage in ("sft", "preference"):
        assert bool(strategy.loss_terms(ewc._context(0, stage))) == (stage == "preference")
        strategy.end_stage(ewc._context(0, stage))
        assert_close(strategy.penalty.importance, fishers[stage])
    before = strategy.penalty
    strategy.end_task(ewc._context(0))
    assert strategy.penalty is before


def test_no_more_pairs_than_asked_for_are_looked_at(ewc: Lifelong) -> None:
    """Of one pair the Fisher information is a single squared gradient; it must be that of one of the task's pairs."""
    strategy = ElasticWeightConsolidation(fisher_pairs=1)
    strategy.setup(ewc.run_info)
    strategy.end_stage(ewc._context(0, "sft"))
    strategy.end_task(ewc._context(0))
    parameters = [p for p in ewc.policy.parameters() if p.requires_grad]
    distances = []
    for pair in ewc.tasks[0].train:
        gradients = torch.autograd.grad(log_likelihood(ewc, "sft", pair), parameters)
        expected = torch.cat([g.double().flatten() for g in gradients]).square() / len(pair.chosen)
        distances.append(float((strategy.penalty.importance - expected).norm() / expected.norm()))
    near, *far = sorted(distances)
    assert near < 1e-3 and far[0] > 0.1


# Penalties


def draws() -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Importance and anchor of three tasks, float64, and weights; a weight that no task and one that one task uses."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(50, generator=generator, dtype=torch.float64)  # noqa: E731
    tasks = [(draw().square() * 10.0 ** (3 * draw()), draw()) for _ in range(3)]
    for number, (importance, _) in enumerate(tasks):
        importance[0] = 0
        importance[1] *= number == 1
    return tasks, draw()


def test_one_penalty_equals_the_sum_over_tasks_in_value_and_gradient() -> None:
    tasks, weights = draws()
    weights.requires_grad_()
    explicit = torch.stack([(f * (weights - m).square()).sum() for f, m in tasks]).sum()
    first, *others = tasks
    penalty = Quadratic(*first)
    for other in others:
        penalty = penalty.plus(*other)
    one = penalty(weights)
    torch.testing.assert_close(one, explicit, rtol=1e-12, atol=0)
    expected, found = (torch.autograd.grad(value, weights)[0] for value in (explicit, one))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_online_by_hand() -> None:
    """F = 0.5 (2, 4) + (1, 0) = (2, 2) around the newest weights (1, 1); at (3, 0): 2 * 4 + 2 * 1 = 10."""
    first = Quadratic(torch.tensor([2.0, 4.0]), torch.tensor([7.0, 8.0]))
    both = first.followed_by(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), decay=0.5)
    assert both.importance.tolist() == [2, 2]
    assert both(torch.tensor([3.0, 0.0])) == 10


def test_the_penalty_is_zero_at_the_anchor_and_has_no_gradient_there(ewc: Lifelong) -> None:
    """And a weight moved by 0.1 costs strength / 2 * F * 0.01."""
    context = ewc._context(0, "sft")
    parameters = list(context.run.trained().values())
    (term,) = ewc.strategy.loss_terms(context).values()
    assert term == 0
    assert not any(g.any() for g in torch.autograd.grad(term, parameters))
    importance = ewc.strategy.penalty.importance
    most = int(importance.argmax())
    moved = ewc.strategy.penalty.anchor.clone()
    moved[most] += 0.1
    held, trained = ElasticWeightConsolidation(strength=3.0), context.run.trained()
    held.setup(context.run)
    held.load_state_dict(ewc.strategy.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    with torch.no_grad():
        for name, value in unflatten(moved, trained).items():
            trained[name].copy_(value)
        cost = float(held.loss_terms(context)["ewc"])
        for name, value in before.items():
            trained[name].copy_(value)
    assert cost == pytest.approx(3 / 2 * 0.01 * float(importance[most]), rel=1e-4)


# Runs


def test_the_first_task_is_that_of_seqft_bit_for_bit(ewc: Lifelong, seqft: Path) -> None:
    assert adapter(ewc.folder / "adapter").equal(adapter(seqft / "adapter"))
    assert [row["loss"] for row in steps(ewc.folder)] == [row["loss"] for row in steps(seqft)]
    assert all("ewc" not in row for row in steps(ewc.folder))


def test_the_stronger_the_penalty_the_closer_a_second_task_stays(ewc: Lifelong, tmp_path: Path) -> None:
    """The finished first task goes on with a second one: the state comes from the checkpoint."""
    held, distances = adapter(ewc.folder / "tasks" / "01_instruct" / "adapter"), []
    more = ("sequence.tasks=[instruct,hc3]", "sft.epochs=6", "preference.epochs=0", "resume=force")
    for strength in (0, 1000, 100_000):
        folder = shutil.copytree(ewc.folder, tmp_path / str(strength))
        train_here(folder, *ONE_TASK, *more, "strategy=ewc", f"strategy.strength={strength}")
        distances.append(float((adapter(folder / "adapter") - held).norm()))
    assert distances[0] > 1.03 * distances[1] > 1.03**2 * distances[2]
    second = [row for row in steps(folder) if row["task"] == "hc3"]
    assert second[0]["ewc"] == 0 and second[-1]["ewc"] > 0


def test_wrong_options_and_partitioned_weights_are_refused() -> None:
    for option in ("strength=-1", "decay=1.5", "fisher_pairs=0"):
        key, value = option.split("=")
        with pytest.raises(UserError, match=rf"^strategy\.{key}="):
            ElasticWeightConsolidation(**{key: float(value)})
    with pytest.raises(UserError, match="strategy=ewc does not run with zero=3"):
        build(compose_config(*QUICK, "strategy=ewc", "zero=3"))
