"""The preference step against TRL's DPOTrainer, on the same rows, batches, model and adapter, in one run.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/step.py --rows DATA_ROOT/hh_harmless --dtype float32 --json out.json
    python benchmarks/step.py --rows DATA_ROOT/hh_harmless --check      # the same losses, step by step
    python benchmarks/step.py --rows DATA_ROOT/hh_harmless --profile    # where LifeAlign's own step spends its time

Every contender takes the same optimiser steps: a step runs from lists of token ids to the updated adapter and the loss
as a number, collation, clipping and AdamW included. They alternate every few steps, in an order that rotates, so that what
else the machine does meets all alike. A round is one pass over the steps; pairs/s and ratios are medians over rounds.
Warm-up steps are other batches, and left out. "by CPU time" is the ratio of processor seconds instead of elapsed ones; on a
machine that is shared it is the steadier of the two.

- LifeAlign takes the step of its own ``Trainer`` in its own DeepSpeed engine (ZeRO 0, one process), on a policy made by
  its own ``make_policy``. "online reference" computes the reference of a batch with the product's own ``ReferenceLogps`` before
  its step; "cached reference" has it computed before the clock starts.
- TRL runs in processes of its own (trl_process.py), whose environment is that of the shell: LifeAlign's commands set how
  threads wait and how memory is mapped, which is part of the product and not of TRL. It runs
  ``DPOTrainer.training_step`` with its own collator, clipping, optimiser and schedule, in the order of
  ``transformers.Trainer``. Its callbacks, FLOP counting and logging are left out, and gradient checkpointing, which TRL
  turns on by default, is turned off: both in its favour. ``--trl-default`` adds TRL as it comes, with gradient
  checkpointing and the reference computed in the step. Rows are handed over as token ids, so ``_prepare_dataset`` is
  skipped. In bf16 the base is loaded in bf16 and the adapter is float32, as in LifeAlign (``--trl-autocast`` adds TRL's
  ``bf16=True``).

The share of the machine's matmul rate counts (P+C+R) 4N for the body and (C+R) 4VH for the head (docs/performance.md);
attention scores are not counted.
"""

import os

ENVIRONMENT = dict(os.environ)  # TRL's, as its users have it
os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from lifealign.environment import prepare_process  # noqa: E402

prepare_process()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from subprocess import PIPE  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from common import heading, load_average, rate_line, save_base, table, write_results  # noqa: E402
from contender import (  # noqa: E402
    BETA,
    LR,
    MAX_GRAD_NORM,
    PAIRS_A_STEP,
    SEED,
    Contender,
    Course,
    LifeAlign,
    lengths_of,
    measure,
    parser,
    read_pairs,
    run,
    spread,
    step_flops,
)
from safetensors.torch import save_file  # noqa: E402

from lifealign.data.tokenize import Pair  # noqa: E402
from lifealign.models.adapter import named_factors  # noqa: E402
from lifealign.trainer import plan_batches  # noqa: E402

TOLERANCE = 1e-4  # of --check, float32


class TRL:
    """TRL's DPOTrainer, a step at a time, in a process with the environment that this one was started with.

    Args:
        stack: ends the process.
        factors: file of the adapter to begin with.
    """

    def __init__(
        self,
        stack: ExitStack,
        base: Path,
        dtype: str,
        pairs: Sequence[Pair],
        factors: Path,
        *,
        online: bool,
        autocast: bool,
        checkpointing: bool = False,
    ) -> None:
        self.name = f"TRL, {'online' if online else 'cached'} reference{', checkpointing' if checkpointing else ''}"
        command = [sys.executable, str(Path(__file__).with_name("trl_process.py"))]
        self._process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL, text=True
        )
        stack.callback(self._process.kill)
        rows = [{"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs]
        order = {"base": str(base), "dtype": dtype, "pairs": rows, "factors": str(factors), "online": online}
        numbers = {"batch_size": PAIRS_A_STEP, "lr": LR, "beta": BETA, "max_grad_norm": MAX_GRAD_NORM, "seed": SEED}
        answer = self._ask({**order, **numbers, "autocast": autocast, "checkpointing": checkpointing})
        if answer.strip() != "ready":
            raise RuntimeError("trl_process.py did not start; run it by hand to see why")
        self._cpu_seconds = 0.0

    def _ask(self, line: Any) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(line), file=self._process.stdin, flush=True)
        return self._process.stdout.readline()

    def step(self, indices: Sequence[int]) -> float:
        loss, seconds = json.loads(self._ask(list(indices)))
        self._cpu_seconds += seconds
        return loss

    def cpu_seconds(self) -> float:
        return self._cpu_seconds


def choose_batches(pairs: Sequence[Pair], count: int, order: str) -> list[list[int]]:
    """``count`` batches of the first pairs: shuffled, as TRL's sampler does, or planned as LifeAlign's trainer does."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
    if order == "bucketed":
        return plan_batches(lengths, PAIRS_A_STEP, 1, generator)[:count]
    shuffled = torch.randperm(len(pairs), generator=generator).tolist()
    return [shuffled[i : i + PAIRS_A_STEP] for i in range(0, count * PAIRS_A_STEP, PAIRS_A_STEP)]


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
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=Path, required=True, help="a task's folder, DATA_ROOT/TASK")
    arguments.add_argument("--batches", choices=("random", "bucketed"), default="random", help="what a batch is made of")
    arguments.add_argument("--trl-autocast", action="store_true", help="TRL with bf16=True")
    arguments.add_argument("--trl-default", action="store_true", help="TRL with gradient checkpointing too, its default")
    arguments.add_argument("--check", action="store_true", help="compare losses over --steps steps; fails above the tolerance")
    arguments.add_argument("--profile", action="store_true", help="print the operators of LifeAlign's step; TRL is left out")
    args = arguments.parse_args()
    rows, load = args.rows.resolve(), os.getloadavg()
    count = args.warmup + args.steps

    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_base(base, rows, SEED)
        pairs = read_pairs(base, rows, count * PAIRS_A_STEP)
        lifealign = LifeAlign(stack, base, pairs, args.dtype)
        batches = choose_batches(pairs, count, args.batches)
        if args.profile:
            profile(lifealign, batches)
            return 0
        factors = base / "factors.safetensors"
        save_file({name: p.detach().clone() for name, p in named_factors(lifealign.model)}, factors)
        trl = partial(TRL, stack, base, args.dtype, pairs, factors, autocast=args.trl_autocast)
        contenders: list[Contender] = [trl(online=True), trl(online=False)]
        if args.trl_default:
            contenders.append(trl(online=True, checkpointing=True))
        if args.check:
            return check(args, [*contenders, lifealign], batches[: args.steps])
        contenders += [LifeAlign(stack, base, pairs, args.dtype, online=True), lifealign]
        results = compare(args, contenders, lifealign, batches)
    write_results(args.json, {**heading(load), **results})
    return 0


def check(args: argparse.Namespace, contenders: Sequence[Contender], batches: Sequence[Sequence[int]]) -> int:
    """Print the losses side by side; 1 where LifeAlign's, the last, differ from another's."""
    losses = {name: done.losses for name, done in run([Course(c.name, c, batches) for c in contenders], 0).items()}
    columns = [[f"{value:.6f}" for value in values] for values in losses.values()]
    steps = [str(i + 1) for i in range(args.steps)]
    print(table(["step", *losses], list(zip(steps, *columns, strict=True))))
    worst, own = 0.0, losses.pop(contenders[-1].name)
    for other, values in losses.items():
        difference = max(abs(a - b) for a, b in zip(values, own, strict=True))
        print(f"largest difference to {other}: {difference:.2e}")
        worst = max(worst, difference)
    return int(args.dtype == "float32" and worst > TOLERANCE)


def compare(
    args: argparse.Namespace, contenders: Sequence[Contender], lifealign: LifeAlign, batches: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Run the rounds and print the tables; returns all figures."""
    done = measure([[Course(c.name, c, batches) for c in contenders]], args.warmup, args.rounds)
    tokens = lengths_of(lifealign.pairs, batches[args.warmup :])
    names, own = list(done.seconds), lifealign.name
    speed = {name: tokens["pairs"] / args.steps / done.step_seconds(name) for name in names}
    by_round = {name: done.ratios(name, own) for name in names}
    cpu_ratio = {name: done.cpu_ratio(name, own) for name in names}
    differences = {name: done.loss_difference(name, own) for name in names if name != own}
    flops = step_flops(lifealign.model, tokens)
    share = flops / tokens["pairs"] * speed[own] / done.rate(args.dtype)

    drawn = f"{args.batches} batches of {PAIRS_A_STEP} pairs"
    print(f"\n{args.rows.name}, {args.dtype} base, {drawn}, {args.steps} steps, {args.rounds} rounds")
    print(
        table(
            ["", "pairs/s", "ms a step", "LifeAlign is", "over rounds", "by CPU time", "loss differs by"],
            [
                [
                    name,
                    f"{speed[name]:.2f}",
                    f"{1e3 * PAIRS_A_STEP / speed[name]:.0f}",
                    *spread(by_round[name]),
                    f"{cpu_ratio[name]:.2f}x",
                    f"{differences[name]:.1e}" if name in differences else "",
                ]
                for name in names
            ],
        )
    )
    print(
        f"{rate_line({dtype: done.rate(dtype) for dtype in done.rates})}; "
        f"LifeAlign reaches {100 * share:.1f} % of it ({args.dtype}, {flops / args.steps / 1e9:.1f} GFLOP a step)"
    )
    waste = tokens["concatenated_padded"] / tokens["concatenated"] - 1
    print(
        f"tokens a pair: prompt {tokens['prompt'] / tokens['pairs']:.0f}, chosen {tokens['chosen'] / tokens['pairs']:.0f}, "
        f"rejected {tokens['rejected'] / tokens['pairs']:.0f}; padding of concatenated rows {100 * waste:.0f} %"
    )
    print(load_average())
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
        "ratio": {name: statistics.median(values) for name, values in by_round.items()},
        "ratio_by_round": by_round,
        "ratio_of_cpu_time": cpu_ratio,
        "share_of_matmul_rate": share,
        "flops_a_step": flops / args.steps,
        "tokens": tokens,
        "largest_loss_difference": differences,
        **done.to_json(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
