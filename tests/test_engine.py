"""The DeepSpeed engine of a stage: what it waits for, and what is left of it when the stage is over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from lifealign.runtime import distributed
from lifealign.runtime.engine import ZeroOptions, deepspeed_config, step, training_engine
from lifealign.runtime.optimizer import read_optimizer

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def started() -> None:
    distributed.start()


@contextmanager
def engine_of(
    module: nn.Module, zero: int, make_optimizer: MakeOptimizer = torch.optim.AdamW
) -> Iterator[deepspeed.DeepSpeedEngine]:
    def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    with training_engine(module, deepspeed_config(ZeroOptions(zero)), make_optimizer, constant) as engine:
        yield engine


def take_a_step(engine: deepspeed.DeepSpeedEngine) -> None:
    engine.backward(engine(torch.ones(1, 5, device=distributed.device())).sum())
    step(engine)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_closed_engine_leaves_nothing_behind(zero: int) -> None:
    """Its hooks would run in every later pass, and keep it and its optimiser's state for as long as there is a module. When
    it is collected, be it amid the next one's steps, that one goes on."""
    module, made = nn.Linear(5, 3), []

    def noted(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters)
        made.append(weakref.ref(optimizer))
        return optimizer

    for turn in range(1, 4):
        with engine_of(module, zero, noted) as engine:
            take_a_step(engine)
            gc.collect()
            assert [kept() is None for kept in made] == [True] * (turn - 1) + [False]
            take_a_step(engine)
            assert all(state.abs().sum() > 0 for state in read_optimizer(engine).values())
        del engine
    gc.collect()
    assert [kept() for kept in made[:-1]] == [None] * 2
    assert zero == 3 or made[-1]() is None  # ZeRO-3 itself keeps its newest until there is another
    assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_no_step_waits_for_the_device(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    with engine_of(nn.Linear(5, 3), zero) as engine:
        monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(None))
        for _ in range(6):
            take_a_step(engine)
        monkeypatch.undo()
    assert not waits
