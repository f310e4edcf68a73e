"""Cost against prompt share: the shared prefix computes a prompt once, concatenated rows compute it twice.

    python benchmarks/prompt_share.py --json out.json
    python benchmarks/prompt_share.py --total 512 --shares 0 1 4

Rows are random token ids. Prompt share is rho = P / (C + R), P + C + R is the same for all rows, C and R are equal and P is
at least 1, so no layout pads by more than a token. At each share two models, one under the packed layout and one under the
concatenated one, take the same batches in turns through LifeAlign's trainer, with a cached reference. The ratio is packed
time over concatenated time, the median over rounds. Predicted is what the arithmetic says of the body,
(P+C+R) / (2P+C+R) = (1+rho) / (1+2 rho); "and head" adds the head, which costs both the same. Attention is in neither.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from common import body_parameters, heading, save_base, table, write_results  # noqa: E402
from contender import (  # noqa: E402
    BUNDLED_ROWS,
    PAIRS_A_STEP,
    SEED,
    Course,
    Lengths,
    LifeAlign,
    Measurement,
    consecutive,
    measure,
    parser,
    print_machine,
    random_pairs,
    settings,
    spread,
)
from torch import nn  # noqa: E402

from lifealign.data.batch import RowLayout  # noqa: E402
from lifealign.data.tokenize import Pair  # noqa: E402

LAYOUTS = (RowLayout.packed, RowLayout.concatenated)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--total", type=int, default=384, help="tokens a pair, P + C + R")
    arguments.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.5, 1, 2, 4], help="prompt shares P / (C + R)")
    args = arguments.parse_args()
    load = os.getloadavg()
    lengths = {f"{share:g}": Lengths.of(args.total, share) for share in args.shares}
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_base(base, BUNDLED_ROWS, SEED)
        count, generator = args.warmup + args.steps, torch.Generator().manual_seed(SEED)
        pairs: list[Pair] = []
        batches = {}
        for share, own in lengths.items():
            batches[share] = consecutive(len(pairs), count, PAIRS_A_STEP)
            pairs += random_pairs(own, count * PAIRS_A_STEP, generator)
        models = {layout.value: LifeAlign(stack, base, pairs, args.dtype, layout=layout) for layout in LAYOUTS}
        groups = [[Course(f"{name} {share}", own, batches[share]) for name, own in models.items()] for share in lengths]
        done = measure(groups, args.warmup, args.rounds)
        predicted = {share: predict(models["packed"].model, own) for share, own in lengths.items()}
    report(args, done, lengths, predicted)
    results = {
        "lengths": {share: own._asdict() for share, own in lengths.items()},
        "predicted": predicted,
        "ratio_by_round": {share: done.ratios(f"packed {share}", f"concatenated {share}") for share in lengths},
    }
    write_results(args.json, {**heading(load), "settings": settings(args), **results, **done.to_json()})
    return 0


def predict(model: nn.Module, lengths: Lengths) -> dict[str, float]:
    """Packed over concatenated in floating-point operations: of the body, and of body and head."""
    prompt, responses = lengths.prompt, lengths.chosen + lengths.rejected
    body, head = body_parameters(model), model.get_output_embeddings().weight.numel()
    once, twice = (prompt + responses) * body, (2 * prompt + responses) * body
    return {"body": once / twice, "body_and_head": (once + responses * head) / (twice + responses * head)}


def report(
    args: argparse.Namespace, done: Measurement, lengths: dict[str, Lengths], predicted: dict[str, dict[str, float]]
) -> None:
    rows = []
    for share, own in lengths.items():
        packed, concatenated = f"packed {share}", f"concatenated {share}"
        rows.append(
            [
                share,
                f"{own.prompt} + {own.chosen} + {own.rejected}",
                f"{1e3 * done.step_seconds(packed):.0f}",
                f"{1e3 * done.step_seconds(concatenated):.0f}",
                *spread(done.ratios(packed, concatenated)),
                f"{done.cpu_ratio(packed, concatenated):.2f}x",
                f"{predicted[share]['body']:.2f}x",
                f"{predicted[share]['body_and_head']:.2f}x",
                f"{done.loss_difference(packed, concatenated):.1e}",
            ]
        )
    print(
        f"\n{args.dtype} base, batches of {PAIRS_A_STEP} pairs of {args.total} tokens, {args.steps} steps, {args.rounds} rounds"
    )
    headings = ["P/(C+R)", "P + C + R", "packed ms", "concatenated ms", "ratio", "over rounds", "by CPU time"]
    print(table([*headings, "predicted", "and head", "loss differs by"], rows))
    print_machine(done)


if __name__ == "__main__":
    raise SystemExit(main())
