"""Cost against row length, at the same prompt share and the same number of tokens a step.

    python benchmarks/length.py --json out.json
    python benchmarks/length.py --lengths 64 256 1024 --tokens 4096 --share 1

Rows are random token ids of P + C + R tokens with P = share (C + R) and C = R. A step takes as many pairs as fit into
--tokens, at least one. One model takes all lengths, a step of each in turns, through LifeAlign's trainer under the layout
that it chooses itself, with a cached reference. The share of the machine's matmul rate counts (P+C+R) 4N for the body and
(C+R) 4VH for the head (docs/performance.md). Attention scores are not counted, and they grow with the length.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from common import heading, save_base, table, write_results  # noqa: E402
from contender import (  # noqa: E402
    BUNDLED_ROWS,
    SEED,
    Course,
    Lengths,
    LifeAlign,
    Measurement,
    consecutive,
    lengths_of,
    measure,
    parser,
    print_machine,
    random_pairs,
    settings,
    spread,
    step_flops,
)

from lifealign.data.tokenize import Pair  # noqa: E402


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="tokens a pair, P + C + R")
    arguments.add_argument("--tokens", type=int, default=2048, help="tokens a step")
    arguments.add_argument("--share", type=float, default=1.0, help="prompt share P / (C + R)")
    args = arguments.parse_args()
    load = os.getloadavg()
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_base(base, BUNDLED_ROWS, SEED)
        count, generator = args.warmup + args.steps, torch.Generator().manual_seed(SEED)
        pairs: list[Pair] = []
        batches = {}
        for length in args.lengths:
            size = max(1, args.tokens // length)
            batches[str(length)] = consecutive(len(pairs), count, size)
            pairs += random_pairs(Lengths.of(length, args.share), count * size, generator)
        lifealign = LifeAlign(stack, base, pairs, args.dtype)
        done = measure([[Course(name, lifealign, own) for name, own in batches.items()]], args.warmup, args.rounds)
        steps = {name: step_figures(lifealign, own[args.warmup :], done, name, args) for name, own in batches.items()}
    report(args, done, steps)
    results = {"layout": lifealign.policy.layout.value, "by_length": steps, **done.to_json()}
    write_results(args.json, {**heading(load), "settings": settings(args), **results})
    return 0


def step_figures(
    lifealign: LifeAlign, batches: list[list[int]], done: Measurement, name: str, args: argparse.Namespace
) -> dict[str, Any]:
    """What a step of one length is and what it takes."""
    tokens = lengths_of(lifealign.pairs, batches)
    flops, seconds = step_flops(lifealign.model, tokens) / len(batches), done.step_seconds(name)
    at_once = (tokens["prompt"] + tokens["chosen"] + tokens["rejected"]) / len(batches)
    return {
        "pairs": len(batches[0]),
        "tokens": at_once,
        "seconds": seconds,
        "tokens_per_second": at_once / seconds,
        "flops": flops,
        "share_of_matmul_rate": flops / seconds / done.rate(args.dtype),
    }


def report(args: argparse.Namespace, done: Measurement, steps: dict[str, dict[str, Any]]) -> None:
    first = next(iter(steps))
    per_token = {}  # time a token over that of the first length, by round
    for name, own in steps.items():
        per_token[name] = [ratio * steps[first]["tokens"] / own["tokens"] for ratio in done.ratios(name, first)]
    print(f"\n{args.dtype} base, prompt share {args.share:g}, {args.steps} steps, {args.rounds} rounds")
    print(
        table(
            ["tokens a pair", "pairs", "tokens", "ms a step", "tokens/s", "a token costs", "over rounds", "of matmul rate"],
            [
                [
                    name,
                    str(own["pairs"]),
                    f"{own['tokens']:.0f}",
                    f"{1e3 * own['seconds']:.0f}",
                    f"{own['tokens_per_second']:.0f}",
                    *spread(per_token[name]),
                    f"{100 * own['share_of_matmul_rate']:.1f} %",
                ]
                for name, own in steps.items()
            ],
        )
    )
    print_machine(done)


if __name__ == "__main__":
    raise SystemExit(main())
