"""Weight averaging over tasks, on a hand-made adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import compose_config, train_here
from test_lwf import rows

from lifealign.config import build
from lifealign.errors import UserError
from lifealign.runtime import distributed
from lifealign.strategies import Context, Run, State
from lifealign.strategies.wise import Average, Merge, WeightAveraging


def adapter(value: float) -> Any:
    """A policy with two factors that hold ``value`` and its double everywhere."""
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(3, 2, bias=False), "lora_B": torch.nn.Linear(2, 3, bias=False)})
    train_to(policy := SimpleNamespace(model=model), value)
    return policy


def train_to(policy: Any, value: float) -> None:
    for factor, share in zip(policy.model.parameters(), (1, 2), strict=True):
        torch.nn.init.constant_(factor, share * value)


def stands_at(policy: Any, value: float) -> bool:
    return all((p == share * value).all() for p, share in zip(policy.model.parameters(), (1, 2), strict=True))


def begun(strategy: WeightAveraging, policy: Any, task_number: int = 0) -> Context:
    run = Run(policy, Path(), 0, "", None, {}, 8)  # type: ignore[arg-type]
    if task_number == 0:
        strategy.setup(run)
    context = Context(run, SimpleNamespace(train=[]), task_number, "")  # type: ignore[arg-type]
    strategy.begin_task(context)
    return context


@pytest.fixture(autouse=True)
def started() -> None:
    distributed.start()


def test_moving_average_by_hand() -> None:
    """From 0, share 1/4: trained to 4, 0 + 4/4 = 1 stays. Trained on to 5, 1 + (5 - 1)/4 = 2 stays."""
    policy, strategy = adapter(0), WeightAveraging(share=0.25)
    context = begun(strategy, policy)
    train_to(policy, 4)
    strategy.end_task(context)
    assert stands_at(policy, 1)
    context = begun(strategy, policy, 1)
    assert stands_at(policy, 1)
    train_to(policy, 5)
    strategy.end_task(context)
    assert stands_at(policy, 2)


@pytest.mark.parametrize(("merge", "expected"), [(Merge.sum, 1 + 0.5 * (2 + 4)), (Merge.mean, 1 + 0.5 * (2 + 4) / 2)])
def test_task_vectors_by_hand(merge: Merge, expected: float) -> None:
    """From 1, scale 1/2: trained to 3, tau = 2, and 1 + 2/2 = 2 stays. The next task starts from 1; trained to 5, tau = 4."""
    policy, strategy = adapter(1), WeightAveraging(average=Average.task_vectors, merge=merge, scale=0.5)
    context = begun(strategy, policy)
    train_to(policy, 3)
    strategy.end_task(context)
    assert stands_at(policy, 2)
    context = begun(strategy, policy, 1)
    assert stands_at(policy, 1)
    train_to(policy, 5)
    strategy.end_task(context)
    assert stands_at(policy, expected)


@pytest.mark.parametrize("average", list(Average))
def test_a_run_interrupted_inside_a_task_goes_on_as_it_would(average: Average) -> None:
    """Another process sets up from an adapter of its own, takes up the state, and finds the weights of the checkpoint."""
    policy, strategy = adapter(1), WeightAveraging(average=average)
    context = begun(strategy, policy)
    train_to(policy, 3)
    strategy.end_task(context)
    begun(strategy, policy, 1)
    resumed, fresh = WeightAveraging(average=average), adapter(-9)
    resumed.setup(Run(fresh, Path(), 0, "", None, {}, 8))  # type: ignore[arg-type]
    state = strategy.state_dict()
    other = next(kind for kind in Average if kind is not average)
    with pytest.raises(UserError, match=f"strategy.average={other.value}: .* give it {average.value}"):
        WeightAveraging(average=other).load_state_dict(state)
    resumed.load_state_dict(State(state.values, {name: value.clone() for name, value in state.tensors.items()}))
    for one, at in ((strategy, policy), (resumed, fresh)):
        train_to(at, 7)
        one.end_task(Context(Run(at, Path(), 0, "", None, {}, 8), SimpleNamespace(), 1, ""))  # type: ignore[arg-type]
    assert all(a.equal(b) for a, b in zip(policy.model.parameters(), fresh.model.parameters(), strict=True))


def test_a_share_of_one_is_sequential_fine_tuning_to_the_bit() -> None:
    """0.1 + (0.7 - 0.1) is not 0.7 in float32."""
    policy, strategy = adapter(0.1), WeightAveraging(share=1.0)
    context = begun(strategy, policy)
    train_to(policy, 0.7)
    before = [p.clone() for p in policy.model.parameters()]
    strategy.end_task(context)
    assert all(a.equal(b) for a, b in zip(policy.model.parameters(), before, strict=True))


def test_every_task_starts_from_the_initial_adapter(tmp_path: Path) -> None:
    """Before the first step of either task the adapter is fresh, and so is every margin: 0, and the loss of DPO ln 2."""
    small = ("objective=dpo", "sft.epochs=0", "preference.epochs=1", "evaluation.metrics=[chosen_nll]", "data.max_eval=2")
    run = train_here(tmp_path / "run", "strategy=wise", "strategy.average=task_vectors", *small)
    starts = [row for row in rows(run) if row["stage_step"] == 1]
    assert [row["task_number"] for row in starts] == [0, 1]
    assert [row["loss"] for row in starts] == pytest.approx([0.693147, 0.693147], abs=1e-5)
    assert rows(run)[-1]["loss"] != pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("option", ["share=-0.1", "share=1.1", "scale=-1", "scale=inf"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"strategy.{option.split('=')[0]}="):
        build(compose_config("+sequence=six_domains", "strategy=wise", f"strategy.{option}"))
