"""LifeAlign's preference step, a step at a time, and the clock that takes it and others through the same batches.

The scripts that time steps share this. A *course* is a contender with its batches; the courses of a group take their
steps in turns, in an order that rotates, so that what else the machine does meets all alike.

Import after ``lifealign.environment.prepare_process``, as ``common``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from common import VOCAB_SIZE, body_parameters, load_average, matmul_rate, rate_line
from torch import nn

from lifealign.assembly import make_policy
from lifealign.assets import SIX_DOMAINS
from lifealign.config import Config
from lifealign.data.batch import RowLayout
from lifealign.data.options import DataOptions, SequenceOptions
from lifealign.data.tasks import Task, load_tasks
from lifealign.data.tokenize import Pair
from lifealign.models.loading import load_tokenizer, pad_token_id
from lifealign.models.options import BaseDtype, ModelOptions
from lifealign.models.scoring import ReferenceLogps
from lifealign.objectives import DPO
from lifealign.runtime import distributed
from lifealign.runtime.engine import deepspeed_config, training_engine
from lifealign.runtime.options import TrackingMode, TrackingOptions
from lifealign.runtime.tracking import Tracker
from lifealign.stages import PreferenceStage, StageOptions
from lifealign.strategies import Context, Run
from lifealign.strategies.seqft import SeqFT
from lifealign.trainer import Trainer, make_optimizer

PAIRS_A_STEP = 4
LR = 1e-3  # large enough for the losses to move within 20 steps
BETA = 0.1
MAX_GRAD_NORM = 1.0
SEED = 0
DTYPES = (torch.float32, torch.bfloat16)
BUNDLED_ROWS = SIX_DOMAINS / "hh_harmless"  # for a tokenizer, where the rows themselves are random


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every script with steps has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    made.add_argument("--json", type=Path, help="file for all figures")
    return made


# Rows


def read_pairs(base: Path, rows: Path, limit: int | None = None) -> list[Pair]:
    """Training pairs of a task's folder, as the product reads and tokenises them."""
    sequence = SequenceOptions(name="benchmark", tasks=[rows.name])
    data = DataOptions(root=str(rows.parent), max_train=limit, max_eval=1)
    return load_tasks(sequence, data, load_tokenizer(ModelOptions(path=str(base))), SIX_DOMAINS)[0].train


class Lengths(NamedTuple):
    """Tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int

    @classmethod
    def of(cls, total: int, prompt_share: float) -> Lengths:
        """``total`` tokens with P = share (C + R) as near as whole tokens allow; P, C and R are at least 1, C and R alike."""
        prompt = min(max(1, round(total * prompt_share / (1 + prompt_share))), total - 2)
        chosen = (total - prompt) // 2
        return cls(prompt, chosen, total - prompt - chosen)


def random_pairs(lengths: Lengths, count: int, generator: torch.Generator) -> list[Pair]:
    """Pairs of random token ids."""
    draw = lambda n: torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist()  # noqa: E731
    return [Pair(str(i), *map(draw, lengths), "", "", "") for i in range(count)]


def consecutive(start: int, count: int, size: int) -> list[list[int]]:
    """``count`` batches of ``size`` pairs, from pair ``start`` on."""
    return [list(range(i, i + size)) for i in range(start, start + count * size, size)]


def lengths_of(pairs: Sequence[Pair], batches: Sequence[Sequence[int]]) -> dict[str, float]:
    """Tokens of the batches: P, C and R, and what padding does to the rows of TRL's layout."""
    batched = [[pairs[i] for i in batch] for batch in batches]
    used = [p for batch in batched for p in batch]
    sides = [[len(p.prompt) + len(side) for p in batch for side in (p.chosen, p.rejected)] for batch in batched]
    prompt, chosen, rejected = (sum(len(getattr(p, k)) for p in used) for k in ("prompt", "chosen", "rejected"))
    return {
        "pairs": len(used),
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "prompt_share": prompt / (chosen + rejected),
        "concatenated": sum(map(sum, sides)),
        "concatenated_padded": sum(max(s) * len(s) for s in sides),
    }


def step_flops(model: nn.Module, tokens: dict[str, float]) -> float:
    """The arithmetic minimum of the batches with a cached reference: (P + C + R) 4N + (C + R) 4VH."""
    head = model.get_output_embeddings().weight
    responses = tokens["chosen"] + tokens["rejected"]
    return (tokens["prompt"] + responses) * 4 * body_parameters(model) + responses * 4 * head.numel()


# The contender


class LifeAlign:
    """LifeAlign's trainer, a step at a time, in its own DeepSpeed engine (ZeRO 0, one process).

    Args:
        stack: closes the engine.
        base: folder of the base and its tokenizer.
        online: compute the reference of a batch before its step; otherwise it is computed here, for all pairs.
    """

    def __init__(
        self,
        stack: ExitStack,
        base: Path,
        pairs: list[Pair],
        dtype: str,
        *,
        online: bool = False,
        layout: RowLayout = RowLayout.auto,
    ) -> None:
        self.name = f"LifeAlign, {'online' if online else 'cached'} reference"
        self.pairs, self.online = pairs, online
        distributed.start()
        task = Task("benchmark", "benchmark", pairs, [], {}, "")
        config = Config(
            seed=SEED,
            sequence=SequenceOptions(name="benchmark", tasks=[task.name]),
            model=ModelOptions(path=str(base), dtype=BaseDtype(dtype), row_layout=layout),
            objective=DPO(beta=BETA),
            strategy=SeqFT(),
            preference=StageOptions(lr=LR, micro_batch_size=PAIRS_A_STEP, max_grad_norm=MAX_GRAD_NORM),
            tracking=TrackingOptions(mode=TrackingMode.disabled),
        )
        self.tokenizer = load_tokenizer(config.model)
        self.pad_token_id = pad_token_id(self.tokenizer)
        self.policy = make_policy(config, [task])
        engine_config = deepspeed_config(config.zero, micro_batch_size=PAIRS_A_STEP, max_grad_norm=MAX_GRAD_NORM)
        constant = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)
        self.engine = stack.enter_context(
            training_engine(self.policy, engine_config, partial(make_optimizer, config.preference), constant)
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.trainer = Trainer(
            engine=self.engine,
            stage=self._stage([] if online else pairs),
            options=config.preference,
            strategy=config.strategy,
            context=Context(Run(self.policy, folder, SEED, "", self.tokenizer, {}, 8), task, 0, "preference"),
            tracker=stack.enter_context(Tracker(config.tracking, folder, {})),
            pad_token_id=self.pad_token_id,
        )
        self.engine.train()

    def _stage(self, pairs: Sequence[Pair]) -> PreferenceStage:
        reference = ReferenceLogps()
        reference.ensure(self.engine, self.policy, pairs, batch_size=PAIRS_A_STEP, pad_token_id=self.pad_token_id)
        return PreferenceStage(DPO(beta=BETA), reference)

    @property
    def model(self) -> nn.Module:
        return self.policy.model

    def cpu_seconds(self) -> float:
        return time.process_time()

    def step(self, indices: Sequence[int]) -> float:
        """One optimiser step from lists of token ids to the loss as a number; any number of pairs, in one micro-batch."""
        batch = [self.pairs[i] for i in indices]
        if self.online:
            self.trainer.stage = self._stage(batch)
        self.trainer.options = replace(self.trainer.options, micro_batch_size=len(batch))
        return self.trainer.step(self.trainer.collate(self.trainer.read(batch)))


# The clock


class Contender(Protocol):
    name: str

    def step(self, indices: Sequence[int]) -> float:
        """Take a step on these pairs; returns the loss."""

    def cpu_seconds(self) -> float:
        """Processor time of all threads so far."""


STEPS_A_TURN = 10
"""Steps in a row, as in a run: the first step after a pause of a second was measured to take a seventh longer."""


class Course(NamedTuple):
    """A contender and the batches it is to take, those of the warm-up first."""

    name: str
    contender: Contender
    batches: Sequence[Sequence[int]]

    def part(self, start: int | None, end: int | None) -> Course:
        return self._replace(batches=self.batches[start:end])


class Steps(NamedTuple):
    """What one course was, a number for each step."""

    seconds: list[float]
    cpu_seconds: list[float]  # of all threads of the process; what other processes do hardly changes it
    losses: list[float]


def run(courses: Sequence[Course], turn: int) -> dict[str, Steps]:
    """Take all courses to their ends, in turns of ``STEPS_A_TURN`` steps."""
    outcome = {course.name: Steps([], [], []) for course in courses}
    for number, start in enumerate(range(0, len(courses[0].batches), STEPS_A_TURN)):
        shift = (number + turn) % len(courses)
        for name, contender, batches in [*courses[shift:], *courses[:shift]]:
            for batch in batches[start : start + STEPS_A_TURN]:
                started, cpu_started = time.perf_counter(), contender.cpu_seconds()
                loss = contender.step(batch)
                own = outcome[name]
                own.seconds.append(time.perf_counter() - started)
                own.cpu_seconds.append(contender.cpu_seconds() - cpu_started)
                own.losses.append(loss)
    return outcome


@dataclass
class Measurement:
    """Seconds by course, round and step; losses by course and step, the warm-up's too; the machine's speed between rounds."""

    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)

    def passes(self, name: str) -> list[float]:
        """Seconds of each round."""
        return [sum(taken) for taken in self.seconds[name]]

    def step_seconds(self, name: str) -> float:
        """Seconds a step, median over rounds."""
        return statistics.median(self.passes(name)) / len(self.seconds[name][0])

    def ratios(self, name: str, to: str) -> list[float]:
        """Of elapsed time, a number for each round."""
        return [a / b for a, b in zip(self.passes(name), self.passes(to), strict=True)]

    def cpu_ratio(self, name: str, to: str) -> float:
        """Of processor time, over all rounds."""
        return sum(map(sum, self.cpu_seconds[name])) / sum(map(sum, self.cpu_seconds[to]))

    def loss_difference(self, name: str, to: str) -> float:
        """The largest, over steps; a number only where both courses take the same batches from the same weights."""
        return max(abs(a - b) for a, b in zip(self.losses[name], self.losses[to], strict=True))

    def rate(self, dtype: str) -> float:
        return statistics.median(self.rates[dtype])

    def to_json(self) -> dict[str, Any]:
        return {
            "matmul_flops_per_second": {dtype: self.rate(dtype) for dtype in self.rates},
            "losses": self.losses,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "matmul_rates": self.rates,
        }


def measure(groups: Sequence[Sequence[Course]], warmup: int, rounds: int) -> Measurement:
    """Warm up, then run the rounds: each takes group after group, and the courses of a group in turns."""
    done = Measurement()
    for group in groups:
        for name, steps in run([course.part(None, warmup) for course in group], 0).items():
            done.seconds[name], done.cpu_seconds[name], done.losses[name] = [], [], steps.losses
    _measure_rates(done)
    for turn in range(rounds):
        for group in groups:
            for name, steps in run([course.part(warmup, None) for course in group], turn).items():
                done.seconds[name].append(steps.seconds)
                done.cpu_seconds[name].append(steps.cpu_seconds)
                done.losses[name] += steps.losses
        _measure_rates(done)
        print(f"round {turn + 1}: " + ", ".join(f"{n} {sum(s[-1]):.1f} s" for n, s in done.seconds.items()), flush=True)
    return done


def _measure_rates(done: Measurement) -> None:
    for dtype in DTYPES:
        done.rates.setdefault(str(dtype).removeprefix("torch."), []).append(matmul_rate(dtype))


# Output


def spread(ratios: Sequence[float]) -> tuple[str, str]:
    """A ratio's median over rounds, and its range."""
    return f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f}-{max(ratios):.2f}x"


def print_machine(done: Measurement) -> None:
    print(rate_line({dtype: done.rate(dtype) for dtype in done.rates}))
    print(load_average())


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON can hold them, and what is fixed."""
    given = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != "json"}
    return {**given, "lr": LR, "beta": BETA}
