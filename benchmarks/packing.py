"""Row layouts: the preference step on the same batches, and the padding of a whole epoch.

    python benchmarks/packing.py --rows DATA_ROOT/hh_harmless --json out.json

packed        prompt | chosen | rejected of every pair, one after the other, on a single line
shared        prompt | chosen | rejected, a line a pair
concatenated  prompt | chosen and prompt | rejected, two lines a pair

Each layout trains a model of its own through LifeAlign's trainer, with a cached reference, on batches as the trainer
plans them (``plan_batches``: rows of like length together). A ratio is a layout's time over that of the packed one, the
median over rounds; the losses must agree. The second table cuts one epoch of all rows in the same way and counts tokens
and the positions that the layout computes; padding is the share of positions without a token.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from common import heading, save_base, table, write_results  # noqa: E402
from contender import (  # noqa: E402
    SEED,
    Course,
    LifeAlign,
    consecutive,
    lengths_of,
    measure,
    parser,
    print_machine,
    read_pairs,
    settings,
    spread,
    step_flops,
)

from lifealign.data.batch import RowLayout, collate  # noqa: E402
from lifealign.data.tokenize import Pair  # noqa: E402
from lifealign.models.scoring import pair_row  # noqa: E402
from lifealign.trainer import plan_batches  # noqa: E402

LAYOUTS = (RowLayout.packed, RowLayout.shared, RowLayout.concatenated)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=Path, required=True, help="a task's folder, DATA_ROOT/TASK")
    arguments.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    arguments.add_argument("--epoch-pairs", type=int, help="count padding over the first of the rows; default: all")
    args = arguments.parse_args()
    rows, load = args.rows.resolve(), os.getloadavg()
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_base(base, rows, SEED)
        epoch = plan_epoch(read_pairs(base, rows, args.epoch_pairs), args.batch_size)
        padding = {layout.value: count_positions(epoch, layout) for layout in LAYOUTS}
        print_padding(args, padding, len(epoch))
        results = compare(args, stack, base, epoch)
    write_results(args.json, {**heading(load), "settings": settings(args), **results, "epoch": padding})
    return 0


# Padding


def plan_epoch(pairs: Sequence[Pair], batch_size: int) -> list[list[Pair]]:
    """The batches of one epoch, as the trainer cuts them."""
    plan = plan_batches([pair_row(p).length for p in pairs], batch_size, 1, torch.Generator().manual_seed(SEED))
    return [[pairs[i] for i in batch] for batch in plan]


def count_positions(epoch: Sequence[Sequence[Pair]], layout: RowLayout) -> dict[str, float]:
    """Tokens of an epoch under a layout, and positions that the model computes for them."""
    tokens = positions = 0
    for pairs in epoch:
        batch = collate([pair_row(p) for p in pairs], layout=layout, pad_token_id=0)
        tokens += batch.tokens
        positions += batch.input_ids.numel()
    return {"tokens": tokens, "positions": positions, "padding": 1 - tokens / positions}


def print_padding(args: argparse.Namespace, padding: dict[str, dict[str, float]], batches: int) -> None:
    least = padding["packed"]["positions"]
    print(f"one epoch of {args.rows.name}: {batches} batches of {args.batch_size} pairs")
    print(
        table(
            ["", "tokens", "positions computed", "of packed", "padding"],
            [
                [
                    name,
                    f"{own['tokens']:,}",
                    f"{own['positions']:,}",
                    f"{own['positions'] / least:.2f}x",
                    f"{100 * own['padding']:.1f} %",
                ]
                for name, own in padding.items()
            ],
        )
        + "\n",
        flush=True,
    )


# Time


def compare(args: argparse.Namespace, stack: ExitStack, base: Path, epoch: Sequence[Sequence[Pair]]) -> dict[str, Any]:
    """Time the layouts on the epoch's first whole batches, which are a random choice of its batches."""
    count = args.warmup + args.steps
    pairs = [pair for batch in [b for b in epoch if len(b) == args.batch_size][:count] for pair in batch]
    batches = consecutive(0, len(pairs) // args.batch_size, args.batch_size)
    if len(batches) < count:
        raise SystemExit(f"the rows make {len(batches)} whole batches; --warmup and --steps ask for {count}")
    contenders = {layout.value: LifeAlign(stack, base, pairs, args.dtype, layout=layout) for layout in LAYOUTS}
    done = measure([[Course(name, own, batches) for name, own in contenders.items()]], args.warmup, args.rounds)
    timed = batches[args.warmup :]
    flops = step_flops(contenders["packed"].model, lengths_of(pairs, timed)) / len(timed)
    share = flops / done.step_seconds("packed") / done.rate(args.dtype)
    ratios = {name: done.ratios(name, "packed") for name in contenders}
    print(f"\n{args.dtype} base, batches of {args.batch_size} pairs, {len(timed)} steps, {args.rounds} rounds")
    print(
        table(
            ["", "pairs/s", "ms a step", "of packed", "over rounds", "by CPU time", "loss differs by"],
            [
                [
                    name,
                    f"{args.batch_size / done.step_seconds(name):.2f}",
                    f"{1e3 * done.step_seconds(name):.0f}",
                    *spread(ratios[name]),
                    f"{done.cpu_ratio(name, 'packed'):.2f}x",
                    f"{done.loss_difference(name, 'packed'):.1e}",
                ]
                for name in contenders
            ],
        )
    )
    print(f"packed: {flops / 1e9:.1f} GFLOP a step, {100 * share:.1f} % of the matmul rate")
    print_machine(done)
    return {"ratio_by_round": ratios, "flops_a_step": flops, "share_of_matmul_rate": share, **done.to_json()}


if __name__ == "__main__":
    raise SystemExit(main())
