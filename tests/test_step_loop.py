"""The step loop on the bundled model: what a step fetches, what a logged line holds, where it stops, what runs ahead."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support import QUICK, compose_config

import lifealign.trainer
from lifealign.assembly import make_policy
from lifealign.assets import SIX_DOMAINS
from lifealign.config import build
from lifealign.data.batch import Extent, Row, RowLayout, collate, extent
from lifealign.data.tasks import load_tasks
from lifealign.data.tokenize import Pair
from lifealign.errors import TrainingDiverged
from lifealign.models.adapter import named_factors, read_factors
from lifealign.models.loading import load_tokenizer, pad_token_id
from lifealign.models.scoring import ReferenceLogps
from lifealign.objectives import FPO, PreferenceLoss
from lifealign.runtime import distributed, watchdog
from lifealign.runtime.engine import deepspeed_config, training_engine
from lifealign.runtime.optimizer import read_optimizer
from lifealign.runtime.tracking import Tracker
from lifealign.stages import PreferenceStage, SupervisedStage
from lifealign.strategies import Context, Run, Seen, Strategy
from lifealign.trainer import StepBatch, Trainer, make_optimizer, make_schedule, plan_batches

PAIRS, BATCH, MICRO, STEPS = 20, 8, 4, 6
"""Two epochs of batches of 8, 8 and 4 pairs, in two micro-batches each; of the batch of 4, the second is empty."""


class Penalised(Strategy):
    """With a term in its loss, so that a line has one."""

    def pair_terms(self, context: Context, seen: Seen) -> Mapping[str, torch.Tensor]:
        return {"penalty": 1e-5 * seen.logps.view(len(seen.pairs), -1).square().mean(1)}


class Prepared:
    """A trainer in its engine, and the pairs it is to be trained on."""

    def __init__(self, trainer: Trainer, pairs: list[Pair], folder: Path) -> None:
        self.trainer, self.pairs, self.folder = trainer, pairs, folder

    def plan(self) -> list[list[int]]:
        lengths = [self.trainer.stage.row(pair).length for pair in self.pairs]
        return plan_batches(lengths, BATCH, 2, self.trainer.context.generator("batches"))

    def collate(self, batch: list[int]) -> StepBatch:
        return self.trainer.collate(self.trainer.read([self.pairs[i] for i in batch]))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def adapter(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in read_factors(self.trainer.engine.module.model).items()}


@contextmanager
def prepared(folder: Path, *overrides: str, stage: str = "preference", log_every: int = 1) -> Iterator[Prepared]:
    sizes = [f"{stage}.{k}" for k in (f"micro_batch_size={MICRO}", f"batch_size={BATCH}", "epochs=2")]
    limits = "sequence.tasks=[instruct]", f"data.max_train={PAIRS}"
    config = build(compose_config(*QUICK, *limits, *sizes, *overrides))
    distributed.start()
    tokenizer = load_tokenizer(config.model)
    (task,) = load_tasks(config.sequence, config.data, tokenizer, SIX_DOMAINS)
    policy = make_policy(config, [task])
    options = config.sft if stage == "sft" else config.preference
    settings = deepspeed_config(config.zero, micro_batch_size=MICRO, accumulation=2, max_grad_norm=1.0)
    reference = ReferenceLogps()
    folder.mkdir(parents=True, exist_ok=True)
    with (
        Tracker(config.tracking, folder, {}) as tracker,
        training_engine(policy, settings, partial(make_optimizer, options), partial(make_schedule, options, STEPS)) as engine,
    ):
        reference.ensure(engine, policy, task.train, batch_size=8, pad_token_id=pad_token_id(tokenizer))
        trainer = Trainer(
            engine=engine,
            stage=SupervisedStage() if stage == "sft" else PreferenceStage(config.objective, reference),
            options=options,
            strategy=Penalised(),
            context=Context(Run(policy, folder, 0, "", tokenizer, {}, 8), task, 0, stage),
            tracker=tracker,
            pad_token_id=pad_token_id(tokenizer),
            log_every=log_every,
        )
        yield Prepared(trainer, task.train, folder)


# -- what is skipped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_skipped_step_leaves_weights_and_moments_and_nothing_for_the_next(
    zero: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after it ends where it would have ended, had the bad one never been met but by the schedule."""
    usual, bad = FPO.__call__, [False]

    def maybe(self: FPO, *arguments: torch.Tensor) -> PreferenceLoss:
        result = usual(self, *arguments)
        return result._replace(losses=result.losses * math.nan) if bad[0] else result

    monkeypatch.setattr(FPO, "__call__", maybe)
    ends = []
    for name in ("skipped", "never met"):
        with prepared(tmp_path / name, f"zero={zero}", "preference.max_skipped_steps=1") as made:
            trainer, engine = made.trainer, made.trainer.engine
            first, second, third = (trainer.collate(trainer.read(made.pairs[i : i + BATCH])) for i in range(0, PAIRS, BATCH))
            engine.train()
            trainer.step(first)
            before, moments, rate = made.adapter(), read_optimizer(engine), engine.get_lr()
            if name == "skipped":
                bad[0] = True
                assert math.isnan(trainer.step(second))
                bad[0] = False
                assert all(value.equal(before[factor]) for factor, value in made.adapter().items())
                now = read_optimizer(engine)
                assert moments and now.keys() == moments.keys() and all(now[key].equal(moments[key]) for key in moments)
                assert engine.get_lr() != rate
            else:
                engine.lr_scheduler.step()
            trainer.step(third)
            ends.append(made.adapter())
    assert all(value.equal(ends[1][factor]) for factor, value in ends[0].items())


# -- what is logged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_a_line_holds_means_over_the_steps_since_the_last(stage: str, tmp_path: Path) -> None:
    """Steps 1, 4 and 6 are logged, so lines of 1, 3 and 2 steps. Loss and terms: means over steps; figures: over pairs."""
    with prepared(tmp_path / "every", stage=stage) as every:
        assert every.trainer.train(every.pairs) == STEPS
        expected, weights = every.lines(), [len(batch) for batch in every.plan()]
        adapter = every.adapter()
    with prepared(tmp_path / "some", stage=stage, log_every=3) as some:
        assert some.trainer.train(some.pairs) == STEPS
        found = some.lines()
        assert all(value.equal(adapter[name]) for name, value in some.adapter().items())
    assert [line["stage_step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    assert [line["stage_step"] for line in found] == [1, 4, 6]
    assert "penalty" in found[0]
    assert ("accuracy" in found[0]) == (stage == "preference")
    of_own_step = ("step", "stage_step", "stage_steps", "lr", "grad_norm")
    for line, (start, end) in zip(found, [(0, 1), (1, 4), (4, 6)], strict=True):
        steps, pairs = expected[start:end], weights[start:end]
        assert line.keys() == steps[-1].keys()
        for key in of_own_step:
            assert line[key] == steps[-1][key]
        for key in ("loss", "penalty"):
            assert line[key] == pytest.approx(math.fsum(step[key] for step in steps) / len(steps), rel=1e-12)
        for key in {"accuracy", "margin", "chosen_reward", "rejected_reward", "focal_weight", "gated_share"} & line.keys():
            mean = sum(step[key] * n for step, n in zip(steps, pairs, strict=True)) / sum(pairs)
            assert line[key] == pytest.approx(mean, abs=1e-12)
        tokens = sum(s["tokens_per_second"] / s["pairs_per_second"] * n for s, n in zip(steps, pairs, strict=True))
        assert line["tokens_per_second"] / line["pairs_per_second"] == pytest.approx(tokens / sum(pairs), rel=1e-9)


def test_the_loss_of_a_step_is_that_of_its_pairs(tmp_path: Path) -> None:
    """Before the first step policy and reference agree: FPO with γ = 2 gives ln 2/4 a pair, and the penalty is added."""
    with prepared(tmp_path) as made:
        first, rest = made.pairs[:BATCH], made.pairs[BATCH : BATCH + MICRO]
        loss = made.trainer.step(made.trainer.collate(made.trainer.read(first)), steps=2)
        made.trainer.step(made.trainer.collate(made.trainer.read(rest)))
        (line,) = made.lines()
    assert line["loss"] == loss
    assert line["loss"] - line["penalty"] == pytest.approx(math.log(2) / 4, abs=1e-5)
    assert (line["stage_step"], line["stage_steps"], line["focal_weight"]) == (1, 2, pytest.approx(0.25, abs=1e-5))


@pytest.mark.parametrize("layout", [RowLayout.packed, RowLayout.shared, RowLayout.concatenated])
def test_the_extent_of_a_stage_is_told(layout: RowLayout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with prepared(tmp_path, f"model.row_layout={layout.value}") as made, caplog.at_level(logging.INFO, "lifealign.trainer"):
        made.trainer.train(made.pairs)
        micro_batches = [m for batch in made.plan() for m in made.collate(batch).micro_batches]
    tokens = sum(m.rows.tokens for m in micro_batches if m.counted)
    positions = sum(m.rows.input_ids.numel() for m in micro_batches if m.counted)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lifealign.trainer"]
    assert line == (
        f"preference: {tokens:,} tokens in 6 batches of 8 pairs, rows {layout.value}, {positions:,} positions computed, "
        f"{100 * (positions - tokens) / positions:.1f} % padding"
    )
    assert tokens < positions
    assert positions < tokens * 33 / 32 or layout is not RowLayout.packed


ROWS = [Row([10, 11, 12], [[20, 21, 22], [30, 31]]), Row([13], [[40, 41], [50, 51, 52, 53]])]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (RowLayout.packed, Extent(11, 11)),
        (RowLayout.shared, Extent(11, 12)),  # 6 and 5
        (RowLayout.concatenated, Extent(15, 20)),  # 5, 4, 2 and 4
    ],
)
def test_extent_by_hand_and_as_collated(layout: RowLayout, expected: Extent) -> None:
    batch = collate(ROWS, layout=layout, pad_token_id=0)
    assert extent(ROWS, layout) == expected == (batch.tokens, batch.input_ids.numel())
    assert expected.padding == pytest.approx({11: 0, 12: 1 / 12, 20: 1 / 4}[expected.positions])
    assert Extent(0, 0).padding == 0


# -- what a step waits for ---------------------------------------------------------------------------------------------


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where code of the package, in the main thread, turns a tensor into something that Python can look at."""
    found: list[str] = []

    def counted(name: str) -> None:
        usual = getattr(torch.Tensor, name)

        def wrapper(self: torch.Tensor, *arguments: object) -> object:
            caller = sys._getframe(1)
            own = caller.f_globals.get("__name__", "").startswith("lifealign.")
            if own and threading.current_thread() is threading.main_thread():
                found.append(f"{caller.f_code.co_qualname if sys.version_info >= (3, 11) else caller.f_code.co_name}.{name}")
            return usual(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, wrapper)

    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero", "unique"):
        counted(name)
    return found


@pytest.mark.parametrize("stage", ["sft", "preference"])
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_step_fetches_once(
    log_every: int, stage: str, tmp_path: Path, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps, and the norm of the last. Unlogged steps exchange a loss, a norm and whether all is well."""
    exchanged: list[int] = []
    usual = distributed.sum_over_ranks
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: exchanged.append(values.numel()) or usual(values))
    with prepared(tmp_path, stage=stage, log_every=log_every) as made:
        batches = [made.collate(batch) for batch in made.plan()]
        fetches.clear()
        for number, batch in enumerate(batches):
            made.trainer.step(batch, steps=STEPS if number % log_every == 0 else None)
            assert len(fetches) == number + 1, fetches
        exchanged.clear()
        made.trainer.train(made.pairs)
    known = 3  # the norm of the step before, whether a rank was asked to stop, and whether a line could not be written
    logged = known + 2 + (0 if stage == "sft" else 6)  # the loss, the term, and the figures of a preference stage
    due = [number % log_every == 0 or number + 1 == STEPS for number in range(STEPS)]
    assert exchanged == [*(logged if log_it else known + 1 for log_it in due), known]


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, STEPS])
def test_a_bad_loss_stops_before_its_step(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count()
    usual = FPO.__call__
    before: list[dict[str, torch.Tensor]] = []

    def spoilt(self: FPO, *arguments: torch.Tensor) -> PreferenceLoss:
        result = usual(self, *arguments)
        if next(calls) != 2 * (number - 1):  # the first of two micro-batches
            return result
        before.append(made.adapter())
        return result._replace(losses=result.losses * torch.tensor([1.0, math.nan, *[1.0] * (len(result.losses) - 2)]))

    monkeypatch.setattr(FPO, "__call__", spoilt)
    told = (
        rf"^loss is nan at step {number} of the preference stage of task instruct \(rank 0: [^,;]+\); "
        "the optimiser has not taken this step$"
    )
    with prepared(tmp_path) as made, pytest.raises(TrainingDiverged, match=told):
        try:
            made.trainer.train(made.pairs)
        finally:
            assert all(value.equal(before[0][name]) for name, value in made.adapter().items())
            assert [line["stage_step"] for line in made.lines()] == list(range(1, number))
    assert_no_thread_is_left()


@pytest.mark.parametrize(("zero", "number", "log_every"), [(0, 2, 1), (0, STEPS, 4), (2, 2, 4), (2, STEPS, 1)])
def test_a_bad_gradient_norm_stops_before_the_next_step(zero: int, number: int, log_every: int, tmp_path: Path) -> None:
    """And at the end of the stage, which ends before a checkpoint. The loss of the bad step is finite."""
    with prepared(tmp_path, f"zero={zero}", log_every=log_every) as made:
        calls = count()
        _, factor = next(iter(named_factors(made.trainer.engine.module.model)))
        factor.register_hook(lambda grad: grad * math.inf if next(calls) == 2 * (number - 1) else grad)
        told = rf"^grad_norm is (nan|inf) at step {number} of the preference stage of task instruct; no checkpoint holds this"
        with pytest.raises(TrainingDiverged, match=told):
            made.trainer.train(made.pairs)
        logged = [line["stage_step"] for line in made.lines()]
        assert logged == [step for step in (range(1, STEPS) if log_every == 1 else (1, 5)) if step < number]
        # Each backward pass of a step calls the hook; the step after the bad one has made its own and has not been taken.
        assert next(calls) == 2 * min(number + 1, STEPS)


# -- what runs ahead ---------------------------------------------------------------------------------------------------


def assert_no_thread_is_left() -> None:
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("collate")]


def test_collating_ahead_changes_nothing(tmp_path: Path) -> None:
    with prepared(tmp_path / "ahead") as made:
        made.trainer.train(made.pairs)
        expected, adapter = [line["loss"] for line in made.lines()], made.adapter()
    assert_no_thread_is_left()
    with prepared(tmp_path / "in turn") as made:
        made.trainer.engine.train()
        found = [made.trainer.step(made.collate(batch)) for batch in made.plan()]
        assert all(value.equal(adapter[name]) for name, value in made.adapter().items())
    assert found == expected


def test_the_next_batch_is_collated_meanwhile_and_none_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two waits: collating of a batch is begun before the step before it ends, and not before that step begins."""
    begun = [threading.Event() for _ in range(STEPS)]
    numbers, main, usual_step = count(), threading.current_thread(), Trainer.step
    usual_collate = Trainer.collate
    ahead: list[int] = []

    def collating(self: Trainer, batch: Any) -> Any:
        assert threading.current_thread() is not main
        begun[next(numbers)].set()
        return usual_collate(self, batch)

    def stepping(self: Trainer, batch: Any, **options: Any) -> float:
        number = len(ahead)
        if number + 1 < STEPS:
            assert begun[number + 1].wait(timeout=20), "nothing was collated while this step was being taken"
        ahead.append(sum(event.is_set() for event in begun) - number - 1)
        return usual_step(self, batch, **options)

    monkeypatch.setattr(Trainer, "collate", collating)
    monkeypatch.setattr(Trainer, "step", stepping)
    with prepared(tmp_path) as made:
        made.trainer.train(made.pairs)
    assert ahead == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("number", [1, 3, STEPS])
def test_an_error_of_collating_comes_out_at_its_step(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, usual = count(1), Trainer.collate

    def failing(self: Trainer, batch: Any) -> Any:
        if next(calls) == number:
            raise ValueError("a row needs a prompt")
        return usual(self, batch)

    taken: list[bool] = []
    usual_step = lifealign.trainer.step

    def stepping(engine: Any) -> torch.Tensor | None:
        taken.append(engine.is_gradient_accumulation_boundary())
        return usual_step(engine)

    monkeypatch.setattr(Trainer, "collate", failing)
    monkeypatch.setattr(lifealign.trainer, "step", stepping)
    with prepared(tmp_path) as made, pytest.raises(ValueError, match="a row needs a prompt"):
        made.trainer.train(made.pairs)
    assert sum(taken) == number - 1
    assert_no_thread_is_left()


def test_who_fetches_a_steps_loss_is_seen_to_wait_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator it stands in no file of torch.distributed."""
    seen, usual = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: seen.append(watchdog.here.waits) or usual(self))
    with prepared(tmp_path) as made:
        batch = made.collate(list(range(BATCH)))
        seen.clear()
        made.trainer.step(batch)
    assert True in seen and not watchdog.here.waits
