"""The preference step against TRL's DPOTrainer, on the same rows, batches, model and adapter, in one process.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/step.py --rows DATA_ROOT/hh_harmless --dtype float32 --json out.json
    python benchmarks/step.py --rows DATA_ROOT/hh_harmless --check      # the same losses, step by step
    python benchmarks/step.py --rows DATA_ROOT/hh_harmless --profile    # where LifeAlign's own step spends its time

Every contender takes the same optimiser steps: a step runs from lists of token ids to the updated adapter and the loss
as a number, collation, clipping and AdamW included. All of them take step 1 before any takes step 2, in an order that
rotates, so that what else the machine does meets all alike. A round is one pass over the steps; pairs/s and ratios are
medians over rounds. Warm-up steps are other batches, and left out. "by CPU time" is the ratio of processor seconds
instead of elapsed ones; on a machine that is shared it is the steadier of the two.

- LifeAlign runs its own ``Trainer._step`` in its own DeepSpeed engine (ZeRO 0, one process), on a policy made by
  ``Lifelong``. "online reference" computes the reference of a batch with the product's own ``ReferenceLogps`` before
  its step; "cached reference" has it computed before the clock starts.
- TRL runs ``DPOTrainer.training_step`` with its own collator, clipping, optimiser and schedule, in the order of
  ``transformers.Trainer``. Its callbacks, FLOP counting and logging are left out, and gradient checkpointing, which TRL
  turns on by default, is turned off: both in its favour. Rows are handed over as token ids, so ``_prepare_dataset`` is
  skipped. In bf16 the base is loaded in bf16 and the adapter is float32, as in LifeAlign (``--trl-autocast`` adds TRL's
  ``bf16=True``).

The share of the machine's matmul rate counts (P+C+R) 4N for the body and (C+R) 4VH for the head (docs/performance.md);
attention scores are not counted.
"""

import os

os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from contextlib import ExitStack, contextmanager  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from common import body_parameters, heading, matmul_rate, save_base, table, write_results  # noqa: E402
from torch import nn  # noqa: E402

from lifealign.config import Config  # noqa: E402
from lifealign.data.options import DataOptions, SequenceOptions  # noqa: E402
from lifealign.data.tokenize import Pair  # noqa: E402
from lifealign.lifelong import Lifelong  # noqa: E402
from lifealign.models.adapter import named_factors  # noqa: E402
from lifealign.models.loading import pad_token_id  # noqa: E402
from lifealign.models.options import BaseDtype, ModelOptions  # noqa: E402
from lifealign.models.scoring import ReferenceLogps  # noqa: E402
from lifealign.objectives import DPO  # noqa: E402
from lifealign.runtime import distributed  # noqa: E402
from lifealign.runtime.engine import deepspeed_config, training_engine  # noqa: E402
from lifealign.runtime.options import TrackingMode, TrackingOptions  # noqa: E402
from lifealign.runtime.tracking import Tracker  # noqa: E402
from lifealign.stages import PreferenceStage, StageOptions  # noqa: E402
from lifealign.strategies import Context  # noqa: E402
from lifealign.strategies.seqft import SeqFT  # noqa: E402
from lifealign.trainer import Trainer, make_optimizer, plan_batches  # noqa: E402

PAIRS_A_STEP = 4
LR = 1e-3  # large enough for the losses to move within 20 steps
BETA = 0.1
MAX_GRAD_NORM = 1.0
SEED = 0
TOLERANCE = 1e-4  # of --check, float32


class LifeAlign:
    """LifeAlign's trainer, a step at a time."""

    def __init__(self, stack: ExitStack, base: Path, rows: Path, dtype: str, pairs: int, *, online: bool) -> None:
        self.name = f"LifeAlign, {'online' if online else 'cached'} reference"
        self.online = online
        distributed.start()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = StageOptions(lr=LR, micro_batch_size=PAIRS_A_STEP, max_grad_norm=MAX_GRAD_NORM)
        tracking = TrackingOptions(mode=TrackingMode.disabled)
        config = Config(
            seed=SEED,
            sequence=SequenceOptions(name="benchmark", tasks=[rows.name]),
            data=DataOptions(root=str(rows.parent), max_train=pairs, max_eval=1),
            model=ModelOptions(path=str(base), dtype=BaseDtype(dtype)),
            objective=DPO(beta=BETA),
            strategy=SeqFT(),
            preference=options,
            tracking=tracking,
        )
        tracker = stack.enter_context(Tracker(tracking, folder, {}))
        self.lifelong = Lifelong(config, folder, tracker)
        task = self.lifelong.tasks[0]
        self.pairs: list[Pair] = task.train
        engine_config = deepspeed_config(config.zero, micro_batch_size=PAIRS_A_STEP, max_grad_norm=MAX_GRAD_NORM)
        constant = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)
        self.engine = stack.enter_context(
            training_engine(self.lifelong.policy, engine_config, partial(make_optimizer, options), constant)
        )
        self.pad_token_id = pad_token_id(self.lifelong.tokenizer)
        self.trainer = Trainer(
            engine=self.engine,
            stage=self._stage([] if online else self.pairs),
            options=options,
            strategy=config.strategy,
            context=Context(self.lifelong.run_info, task, 0, "preference"),
            tracker=tracker,
            pad_token_id=self.pad_token_id,
        )
        self.engine.train()
        self.taken = 0

    def _stage(self, pairs: Sequence[Pair]) -> PreferenceStage:
        reference = ReferenceLogps()
        reference.ensure(self.engine, self.lifelong.policy, pairs, batch_size=PAIRS_A_STEP, pad_token_id=self.pad_token_id)
        return PreferenceStage(DPO(beta=BETA), reference)

    @property
    def model(self) -> nn.Module:
        return self.lifelong.policy.model

    def step(self, indices: Sequence[int]) -> float:
        batch = [self.pairs[i] for i in indices]
        if self.online:
            self.trainer.stage = self._stage(batch)
        shares = list(self.trainer._micro_batches(batch, PAIRS_A_STEP, 1))
        values = self.trainer._step(batch, shares, self.taken)
        self.taken += 1
        return values["loss"]


@contextmanager
def outside_process_group() -> Iterator[None]:
    """LifeAlign has joined a process group of one; told of it, accelerate would wrap TRL's model for several processes."""
    with mock.patch.dict(os.environ):
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(variable, None)
        yield


class TRL:
    """TRL's DPOTrainer, a step at a time, from the adapter in ``factors``."""

    def __init__(
        self,
        stack: ExitStack,
        base: Path,
        dtype: str,
        pairs: Sequence[Pair],
        factors: dict[str, torch.Tensor],
        *,
        online: bool,
        autocast: bool,
    ) -> None:
        from accelerate.utils import DistributedType
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        class Pretokenised(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
                return dataset

        self.name = f"TRL, {'online' if online else 'cached'} reference"
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        disable_progress_bars()
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS_A_STEP,
            precompute_ref_log_probs=not online,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            beta=BETA,
            gradient_checkpointing=False,
            bf16=autocast,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=SEED,
        )
        columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
        self.trainer = trainer = Pretokenised(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)),
            args=arguments,
            train_dataset=Dataset.from_list([{key: getattr(p, of) for key, of in columns.items()} for p in pairs]),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        assert trainer.accelerator.distributed_type is DistributedType.NO, "TRL must not wrap its model"
        own = dict(named_factors(trainer.model))
        assert own.keys() == factors.keys()
        for name, value in factors.items():
            assert own[name].dtype == torch.float32
            own[name].data.copy_(value)
        trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
        trainer.current_gradient_accumulation_steps = 1
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.model.train()
        self.rows = trainer.train_dataset.to_list()

    def step(self, indices: Sequence[int]) -> float:
        trainer = self.trainer
        inputs = trainer.data_collator([self.rows[i] for i in indices])
        loss = trainer.training_step(self.model, inputs)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        return loss.item()


Contender = LifeAlign | TRL


def choose_batches(pairs: Sequence[Pair], count: int, order: str) -> list[list[int]]:
    """``count`` batches of the first pairs: shuffled, as TRL's sampler does, or planned as LifeAlign's trainer does."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
    if order == "bucketed":
        return plan_batches(lengths, PAIRS_A_STEP, 1, generator)[:count]
    shuffled = torch.randperm(len(pairs), generator=generator).tolist()
    return [shuffled[i : i + PAIRS_A_STEP] for i in range(0, count * PAIRS_A_STEP, PAIRS_A_STEP)]


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


class Round(NamedTuple):
    """What one contender did over the batches, a number for each step."""

    seconds: list[float]
    cpu_seconds: list[float]  # of all threads of the process; what other processes do hardly changes it
    losses: list[float]


def run(contenders: Sequence[Contender], batches: Sequence[Sequence[int]], turn: int) -> dict[str, Round]:
    """Take all contenders through the batches, in turns."""
    outcome = {c.name: Round([], [], []) for c in contenders}
    for number, indices in enumerate(batches):
        shift = (number + turn) % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            started, cpu_started = time.perf_counter(), time.process_time()
            loss = contender.step(indices)
            own = outcome[contender.name]
            own.seconds.append(time.perf_counter() - started)
            own.cpu_seconds.append(time.process_time() - cpu_started)
            own.losses.append(loss)
    return outcome


def loss_differences(losses: dict[str, list[float]], against: str) -> dict[str, float]:
    return {
        name: max(abs(a - b) for a, b in zip(values, losses[against], strict=True))
        for name, values in losses.items()
        if name != against
    }


def profile(contender: LifeAlign, batches: Sequence[Sequence[int]]) -> None:
    """Print torch.profiler's table of LifeAlign's step."""
    for indices in batches[:3]:
        contender.step(indices)
    measured = batches[3:]
    started = time.perf_counter()
    for indices in measured:
        contender.step(indices)
    plain = time.perf_counter() - started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for indices in measured:
            contender.step(indices)
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    print(f"{contender.name}: {1e3 * plain / len(measured):.1f} ms a step without the profiler, over {len(measured)} steps")
    rows = [
        [
            e.key,
            f"{e.count / len(measured):.1f}",
            f"{e.self_cpu_time_total / 1e3 / len(measured):.2f}",
            f"{100 * e.self_cpu_time_total / total:.1f}",
        ]
        for e in events[:25]
    ]
    rows.append(["all operators", "", f"{total / 1e3 / len(measured):.2f}", "100.0"])
    print(table(["operator", "calls a step", "self ms a step", "%"], rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="a task's folder, DATA_ROOT/TASK")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--batches", choices=("random", "bucketed"), default="random", help="what a batch is made of")
    parser.add_argument("--trl-autocast", action="store_true", help="TRL with bf16=True")
    parser.add_argument("--check", action="store_true", help="compare losses over --steps steps; fails above the tolerance")
    parser.add_argument("--profile", action="store_true", help="print the operators of LifeAlign's step; TRL is left out")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    rows, load = args.rows.resolve(), os.getloadavg()
    needed = (args.warmup + args.steps) * PAIRS_A_STEP

    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_base(base, rows, SEED)
        lifealign = LifeAlign(stack, base, rows, args.dtype, needed, online=False)
        pairs = lifealign.pairs
        batches = choose_batches(pairs, args.warmup + args.steps, args.batches)
        if args.profile:
            profile(lifealign, batches)
            return 0
        factors = {name: p.detach().clone() for name, p in named_factors(lifealign.model)}
        trl = partial(TRL, stack, base, args.dtype, pairs, factors, autocast=args.trl_autocast)
        with outside_process_group():
            contenders: list[Contender] = [trl(online=True), trl(online=False)]
        if not args.check:
            contenders.append(LifeAlign(stack, base, rows, args.dtype, needed, online=True))
        contenders.append(lifealign)

        if args.check:
            outcome = run(contenders, batches[: args.steps], 0)
            return report_check(args, {name: done.losses for name, done in outcome.items()}, lifealign.name)
        results = measure(args, contenders, lifealign, batches)
    write_results(args.json, {**heading(load), **results})
    return 0


def report_check(args: argparse.Namespace, losses: dict[str, list[float]], name: str) -> int:
    columns = [[f"{value:.6f}" for value in values] for values in losses.values()]
    steps = [str(i + 1) for i in range(args.steps)]
    print(table(["step", *losses], list(zip(steps, *columns, strict=True))))
    worst = 0.0
    for other, difference in loss_differences(losses, name).items():
        print(f"largest difference to {other}: {difference:.2e}")
        worst = max(worst, difference)
    return int(args.dtype == "float32" and worst > TOLERANCE)


def measure(
    args: argparse.Namespace, contenders: Sequence[Contender], lifealign: LifeAlign, batches: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Warm up, run the rounds, print the tables; returns all figures."""
    dtypes = (torch.float32, torch.bfloat16)
    outcome = run(contenders, batches[: args.warmup], 0)
    losses = {name: list(done.losses) for name, done in outcome.items()}
    seconds: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
    cpu_seconds: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
    rates: dict[torch.dtype, list[float]] = {dtype: [matmul_rate(dtype)] for dtype in dtypes}
    for turn in range(args.rounds):
        outcome = run(contenders, batches[args.warmup :], turn)
        for name, done in outcome.items():
            seconds[name].append(done.seconds)
            cpu_seconds[name].append(done.cpu_seconds)
            losses[name] += done.losses
        for dtype in dtypes:
            rates[dtype].append(matmul_rate(dtype))
        print(f"round {turn + 1}: " + ", ".join(f"{n} {sum(s[-1]):.1f} s" for n, s in seconds.items()), flush=True)

    tokens = lengths_of(lifealign.pairs, batches[args.warmup :])
    passes = {n: [sum(taken) for taken in rounds] for n, rounds in seconds.items()}
    speed = {n: tokens["pairs"] / statistics.median(p) for n, p in passes.items()}
    by_round = {n: [a / b for a, b in zip(p, passes[lifealign.name], strict=True)] for n, p in passes.items()}
    ratio = {n: statistics.median(values) for n, values in by_round.items()}
    cpu = {n: sum(map(sum, rounds)) for n, rounds in cpu_seconds.items()}
    cpu_ratio = {n: value / cpu[lifealign.name] for n, value in cpu.items()}
    medians = {str(dtype).removeprefix("torch."): statistics.median(values) for dtype, values in rates.items()}
    flops = step_flops(lifealign.model, tokens)
    share = flops / tokens["pairs"] * speed[lifealign.name] / medians[args.dtype]
    differences = loss_differences(losses, lifealign.name)

    drawn = f"{args.batches} batches of {PAIRS_A_STEP} pairs"
    print(f"\n{args.rows.name}, {args.dtype} base, {drawn}, {args.steps} steps, {args.rounds} rounds")
    print(
        table(
            ["", "pairs/s", "ms a step", "LifeAlign is", "over rounds", "by CPU time", "loss differs by"],
            [
                [
                    name,
                    f"{value:.2f}",
                    f"{1e3 * PAIRS_A_STEP / value:.0f}",
                    f"{ratio[name]:.2f}x",
                    f"{min(by_round[name]):.2f}-{max(by_round[name]):.2f}x",
                    f"{cpu_ratio[name]:.2f}x",
                    f"{differences[name]:.1e}" if name in differences else "",
                ]
                for name, value in speed.items()
            ],
        )
    )
    print(
        f"matmul rate: float32 {medians['float32'] / 1e9:.0f} GFLOP/s, bfloat16 {medians['bfloat16'] / 1e9:.0f} GFLOP/s; "
        f"LifeAlign reaches {100 * share:.1f} % of it ({args.dtype}, {flops / args.steps / 1e9:.1f} GFLOP a step)"
    )
    waste = tokens["concatenated_padded"] / tokens["concatenated"] - 1
    print(
        f"tokens a pair: prompt {tokens['prompt'] / tokens['pairs']:.0f}, chosen {tokens['chosen'] / tokens['pairs']:.0f}, "
        f"rejected {tokens['rejected'] / tokens['pairs']:.0f}; padding of concatenated rows {100 * waste:.0f} %"
    )
    print("load average: " + " ".join(f"{x:.2f}" for x in os.getloadavg()))
    return {
        "settings": {
            "rows": args.rows.name,
            "dtype": args.dtype,
            "batches": args.batches,
            "pairs_a_step": PAIRS_A_STEP,
            "steps": args.steps,
            "rounds": args.rounds,
            "warmup": args.warmup,
            "lr": LR,
            "beta": BETA,
            "trl_autocast": args.trl_autocast,
        },
        "pairs_per_second": speed,
        "ratio": ratio,
        "ratio_by_round": by_round,
        "ratio_of_cpu_time": cpu_ratio,
        "matmul_flops_per_second": medians,
        "share_of_matmul_rate": share,
        "flops_a_step": flops / args.steps,
        "tokens": tokens,
        "largest_loss_difference": differences,
        "losses": losses,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "matmul_rates": {str(dtype): values for dtype, values in rates.items()},
    }


if __name__ == "__main__":
    raise SystemExit(main())
