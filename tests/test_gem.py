"""GEM and A-GEM: the quadratic program, the gradients of the past, and what a step does to the loss on them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import QUICK, compose_config, train_here

from lifealign.config import build, resolved
from lifealign.data.tokenize import Pair
from lifealign.errors import TrainingDiverged, UserError
from lifealign.lifelong import Lifelong
from lifealign.models.loading import enable_gradient_checkpointing, pad_token_id
from lifealign.models.policy import Policy
from lifealign.runtime import distributed
from lifealign.runtime.tracking import Tracker
from lifealign.strategies import Context
from lifealign.strategies.gem import (
    AveragedGradientEpisodicMemory,
    EpisodicMemory,
    GradientEpisodicMemory,
    Gradients,
    dual_solution,
)
from lifealign.strategies.gradients import flatten, inner_products, mean_gradients, sample, unflatten

ONE_TASK = (
    "sequence.tasks=[instruct]",
    "data.max_train=5",
    "data.max_eval=2",
    "sft.epochs=1",
    "preference.epochs=1",
    "evaluation.metrics=[preference_accuracy]",
    "checkpoint.keep=3",
)
"""One optimiser step a stage, on five pairs."""

TWO_TASKS = (*ONE_TASK, "sequence.tasks=[instruct,hc3]", "resume=force")
"""What makes a finished run of one task go on with a second."""


def adapter(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "adapter_model.safetensors").items())])


@pytest.fixture(scope="module")
def seqft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(tmp_path_factory.mktemp("seqft") / "run", *ONE_TASK, "strategy=seqft")


@pytest.fixture(scope="module")
def after_one(tmp_path_factory: pytest.TempPathFactory) -> Lifelong:
    """A run of one task with GEM, and all that it leaves in memory."""
    folder = tmp_path_factory.mktemp("gem") / "run"
    composed = compose_config(*QUICK, *ONE_TASK, f"run.dir={folder}", "strategy=gem")
    config, settings = build(composed), resolved(composed)
    distributed.start()
    folder.mkdir(parents=True)
    with Tracker(config.tracking, folder, settings) as tracker:
        lifelong = Lifelong(config, folder, tracker, settings)
        lifelong.run()
    return lifelong


def context(lifelong: Lifelong, stage: str) -> Context:
    """A stage of a second task; which task does not matter, since all that is looked at is the memory."""
    return Context(lifelong.run_info, lifelong.tasks[0], 1, stage)


def with_memory_of(lifelong: Lifelong, strategy: EpisodicMemory) -> EpisodicMemory:
    strategy.setup(lifelong.run_info)
    strategy.load_state_dict(lifelong.strategy.state_dict())
    return strategy


# The quadratic program


def brute_force(past: np.ndarray, own: np.ndarray, margin: float) -> np.ndarray:
    """The shortest |G^T v + g| over v >= margin, by trying every set of rows whose v is above it; float64."""
    shifted, best = own + margin * past.sum(0), None
    rows = range(len(past))
    for chosen in chain.from_iterable(combinations(rows, size) for size in range(len(past) + 1)):
        some = past[list(chosen)]
        above = -np.linalg.pinv(some @ some.T, rcond=1e-10) @ some @ shifted if chosen else np.zeros(0)
        if (above >= -1e-12).all():
            candidate = shifted + some.T @ above
            best = candidate if best is None or candidate @ candidate < best @ best else best
    assert best is not None
    return best


def cases() -> list[tuple[np.ndarray, np.ndarray]]:
    """(G, g): random, of very different lengths, dependent, repeated, opposed, with zeros, more than dimensions."""
    rng = np.random.default_rng(0)
    found = []
    for t, dimensions in [(1, 3), (2, 5), (3, 4), (5, 20), (6, 3)] * 8:
        past, own = rng.normal(size=(t, dimensions)), rng.normal(size=dimensions)
        past *= 10 ** rng.uniform(-3, 1, size=(t, 1))
        found.append((past, own))
        found.append((np.vstack([past, past[:1], 2 * past[:1] + past[-1:]]), own))
        found.append((np.vstack([past, np.zeros((1, dimensions))]), 1e-4 * own))
        found.append((np.vstack([past, -past[:1]]), own))
    return found


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
def test_the_projection_is_that_of_brute_force_and_violates_nothing(margin: float) -> None:
    """Over 160 cases. The projected gradient is unique, v is not. A row's product may be negative by rounding alone."""
    projected = 0
    for past, own in cases():
        rows = np.vstack([past, own])
        multiples = dual_solution(rows @ rows.T, margin)
        if (past @ own >= 0).all():
            assert not multiples.any()
            continue
        projected += 1
        assert (multiples >= margin * (1 - 1e-9)).all()
        found, expected = own + past.T @ multiples, brute_force(past, own, margin)
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(rows).max())
        assert (past @ found >= -1e-6 * np.linalg.norm(past, axis=1) * np.linalg.norm(own)).all()
    assert projected > 80


def test_the_dual_by_hand() -> None:
    """G = (1, 0), g = (-1, 3): v = 1 takes the component away, and a margin of 2.5 adds 2.5."""
    rows = np.array([[1.0, 0], [-1, 3]])
    assert dual_solution(rows @ rows.T, 0.0) == pytest.approx([1])
    assert dual_solution(rows @ rows.T, 0.5) == pytest.approx([1])
    assert dual_solution(rows @ rows.T, 2.5) == pytest.approx([2.5])


def test_agem_by_hand() -> None:
    """g_ref = (0, 2), g = (3, -1): g - (-2 / 4) g_ref = (3, 0). And (3, 1) speaks against nothing."""
    for own, expected in (([3.0, -1.0], [3, 0]), ([3.0, 1.0], [3, 1])):
        rows = torch.tensor([[0.0, 2.0], own])
        multiple = AveragedGradientEpisodicMemory().multiples(inner_products(rows))
        assert (rows[1] + torch.from_numpy(multiple).float() @ rows[:1]).tolist() == expected


# Gradients of the past


def test_the_sample_is_of_that_size_without_repeats_and_the_same_again() -> None:
    pairs = [Pair(str(i), [1], [2], [3], "", "", "") for i in range(10)]
    first, again = (sample(pairs, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0))
    assert first == again and len({pair.id for pair in first}) == 4
    assert {p.id for p in sample(pairs, None, torch.Generator())} == {p.id for p in sample(pairs, 99, torch.Generator())}
    assert len(sample(pairs, None, torch.Generator())) == 10


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_a_memorys_gradient_is_that_of_the_stages_mean_over_all_of_it(stage: str, after_one: Lifelong) -> None:
    """Two sets of uneven pairs, two pairs at a time, against one mean over tokens (SFT) or pairs and one backward pass."""
    run, pairs = after_one.run_info, after_one.strategy.memory[0]
    assert len(pairs) == 5 and len({len(pair.chosen) for pair in pairs}) > 1
    parameters = list(run.trained().values())
    found = mean_gradients(run, stage, [pairs, pairs[:3]], parameters, at_once=2)
    for row, of in zip(found, (pairs, pairs[:3]), strict=True):
        count = sum(len(pair.chosen) for pair in of) if stage == "sft" else len(of)
        expected = flatten(torch.autograd.grad(run.losses(stage, of).sum() / count, parameters))
        assert (row - expected).norm() < 1e-4 * expected.norm()
    assert all(p.grad is None for p in parameters)


def test_activations_are_computed_again_where_training_does_so(after_one: Lifelong) -> None:
    """The same gradient, by twice the passes through a layer; and everything is in the mode that it was in."""
    run, pairs = after_one.run_info, after_one.strategy.memory
    parameters, policy, calls = list(run.trained().values()), run.policy, []
    handle = policy.base.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    policy.train()
    kept = mean_gradients(run, "preference", pairs, parameters, at_once=2)
    passes = len(calls)
    enable_gradient_checkpointing(policy.model, zero_stage=0)
    recomputed = mean_gradients(run, "preference", pairs, parameters, at_once=2)
    policy.model.gradient_checkpointing_disable()
    handle.remove()
    assert len(calls) == 3 * passes > 0
    assert (recomputed - kept).norm() <= 1e-5 * kept.norm()
    assert all(module.training for module in policy.modules())
    policy.eval()


# A step


def named(lifelong: Lifelong, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    return unflatten(vector, lifelong.run_info.trained())


def memory_gradient(lifelong: Lifelong, stage: str) -> torch.Tensor:
    run = lifelong.run_info
    return mean_gradients(run, stage, lifelong.strategy.memory, list(run.trained().values()), at_once=8)[0]


@pytest.mark.parametrize("make", [GradientEpisodicMemory, AveragedGradientEpisodicMemory])
def test_a_gradient_that_violates_nothing_is_handed_back_itself(make: type[EpisodicMemory], after_one: Lifelong) -> None:
    strategy = with_memory_of(after_one, make())
    own = named(after_one, 3 * memory_gradient(after_one, "sft"))
    assert strategy.transform_gradients(context(after_one, "sft"), own) is own


@pytest.mark.parametrize(("margin", "left"), [(0.0, 0.0), (0.5, 0.0), (3.0, 1.0)])
def test_what_speaks_against_the_memory_is_taken_out(margin: float, left: float, after_one: Lifelong) -> None:
    """g = u - 2 m with u orthogonal to the memory's gradient m: v = 2, or the margin where that is more."""
    m = memory_gradient(after_one, "preference").double()
    u = torch.randn(m.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * m.norm() / len(m) ** 0.5
    u -= (u @ m) / (m @ m) * m
    strategy = with_memory_of(after_one, GradientEpisodicMemory(margin=margin, memory_batch=None))
    changed = strategy.transform_gradients(context(after_one, "preference"), named(after_one, (u - 2 * m).float()))
    assert (flatten(changed.values()) - (u + left * m)).norm() < 1e-4 * m.norm()


def test_gradients_that_are_not_finite_stop_the_run(after_one: Lifelong) -> None:
    strategy = with_memory_of(after_one, GradientEpisodicMemory())
    own = named(after_one, torch.full_like(memory_gradient(after_one, "sft"), float("nan")))
    with pytest.raises(TrainingDiverged, match="step 1 of the sft stage"):
        strategy.transform_gradients(context(after_one, "sft"), own)


def step_down(policy: Policy, gradients: Mapping[str, torch.Tensor], size: float) -> None:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in gradients:
                parameter.sub_(gradients[name], alpha=size)


def swapped(pairs: Sequence[Pair]) -> list[Pair]:
    return [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]


@pytest.mark.parametrize(
    "strategy", [GradientEpisodicMemory(), GradientEpisodicMemory(margin=0.0), AveragedGradientEpisodicMemory()]
)
def test_the_memorys_loss_does_not_rise_in_a_step_that_would_raise_it(strategy: EpisodicMemory, after_one: Lifelong) -> None:
    """The second task wants the opposite of the first: its pairs are those of the first, the other way round.

    A plain step raises the loss on the memory by about size |g|^2, a projected one by terms in size^2 alone.
    """
    run, memory = after_one.run_info, after_one.strategy.memory[0]
    opposite = swapped(memory)[:3]
    after_one.reference.ensure(run.policy, run.policy, opposite, batch_size=8, pad_token_id=pad_token_id(run.tokenizer))
    own = named(after_one, mean_gradients(run, "preference", [opposite], list(run.trained().values()), at_once=8)[0])
    turned = with_memory_of(after_one, strategy).transform_gradients(context(after_one, "preference"), own)
    size = 1e-3 / float(flatten(own.values()).norm())

    def rise(gradients: Mapping[str, torch.Tensor]) -> float:
        before = {name: p.detach().clone() for name, p in run.trained().items()}
        losses = []
        with torch.no_grad():
            losses.append(run.losses("preference", memory).double().mean())
            step_down(run.policy, gradients, size)
            losses.append(run.losses("preference", memory).double().mean())
            for name, parameter in run.trained().items():
                parameter.copy_(before[name])
        return float(losses[1] - losses[0])

    plain = rise(own)
    assert plain > 0
    assert rise(turned) < 0.01 * plain


# Stored gradients


def test_stored_gradients_are_running_averages_of_past_stages(after_one: Lifelong) -> None:
    """Averages of the steps (4, 0), (0, 0): 0.9 * 4 = 3.6. The next stage's (-1, 1) is then turned to (0, 1), at margin 0."""
    strategy = GradientEpisodicMemory(gradients=Gradients.stored, margin=0.0)
    strategy.setup(after_one.run_info)
    first, second = context(after_one, "sft"), context(after_one, "preference")
    strategy.begin_stage(first)
    assert strategy.transforms_gradients
    for step in ([4.0, 0.0], [0.0, 0.0]):
        given = {"w": torch.tensor(step)}
        assert strategy.transform_gradients(first, given) is given
    strategy.end_stage(first)
    strategy.end_task(first)
    again = GradientEpisodicMemory(gradients=Gradients.stored, margin=0.0)
    again.setup(after_one.run_info)
    again.load_state_dict(strategy.state_dict())
    assert [row.tolist() for row in again.stored] == [pytest.approx([3.6, 0])] and not again.memory
    again.begin_stage(second)
    turned = again.transform_gradients(second, {"w": torch.tensor([-1.0, 1.0])})
    assert turned["w"].tolist() == pytest.approx([0, 1], abs=1e-6)


# Runs


def test_the_first_task_is_that_of_seqft_bit_for_bit(after_one: Lifelong, seqft: Path, tmp_path: Path) -> None:
    """Constraints are of past tasks. Stored gradients are of past stages, and so leave the first stage alone."""
    agem = train_here(tmp_path / "agem", *ONE_TASK, "strategy=agem", "zero=1")
    for folder in (after_one.folder, agem):
        assert adapter(folder / "adapter").equal(adapter(seqft / "adapter"))
    stored = train_here(tmp_path / "stored", *ONE_TASK, "strategy=gem_released", "zero=2")
    before, after = (load_file(folder / "checkpoints" / "00001" / "tensors.safetensors") for folder in (seqft, stored))
    names = [name for name in before if name.startswith("adapter/")]
    assert names and all(after[name].equal(before[name]) for name in names)
    assert "strategy/0" in after


@pytest.mark.slow
def test_a_second_task_is_the_same_at_every_stage_of_zero(after_one: Lifelong, seqft: Path, tmp_path: Path) -> None:
    """Up to the rounding of their optimisers, and not what it would be without constraints."""
    ended = {}
    for name, folder, options in (
        ("seqft", seqft, ("strategy=seqft",)),
        *((stage, after_one.folder, ("strategy=gem", "strategy.margin=3", f"zero={stage}")) for stage in "012"),
    ):
        copied = shutil.copytree(folder, tmp_path / name)
        ended[name] = adapter(train_here(copied, *TWO_TASKS, *options) / "adapter")
    apart = float((ended["0"] - ended["seqft"]).norm())
    assert apart > 0
    for stage in "12":
        assert float((ended[stage] - ended["0"]).norm()) < 1e-3 * apart


def test_wrong_options_and_partitioned_weights_are_refused() -> None:
    for make, key in [
        (GradientEpisodicMemory, "memory_pairs"),
        (GradientEpisodicMemory, "micro_batch_size"),
        (GradientEpisodicMemory, "memory_batch"),
        (AveragedGradientEpisodicMemory, "sample_pairs"),
    ]:
        with pytest.raises(UserError, match=rf"^strategy\.{key}=0: must be at least 1"):
            make(**{key: 0})
    with pytest.raises(UserError, match=r"^strategy\.margin=-1"):
        GradientEpisodicMemory(margin=-1)
    for name in ("gem", "agem"):
        with pytest.raises(UserError, match=f"strategy={name} does not run with zero=3"):
            build(compose_config(*QUICK, f"strategy={name}", "zero=3"))
        offload = "zero.settings.offload_optimizer.device"
        with pytest.raises(UserError, match=rf"strategy={name} does not run with zero\.settings\.offload_optimizer"):
            build(compose_config(*QUICK, f"strategy={name}", "zero=2", f"{offload}=cpu"))
        build(compose_config(*QUICK, f"strategy={name}", "zero=2", f"{offload}=none"))
    build(compose_config(*QUICK, "strategy=er", "zero=2", f"{offload}=cpu"))
