"""The output head: memory and time of response log-probabilities and their gradient to the hidden states, frozen head.

    python benchmarks/head.py --json out.json                     # 2,048 response tokens, vocabulary 151,936, hidden 896

naive          log_softmax over all logits, gather, autograd
cross_entropy  torch.nn.functional.cross_entropy over all logits, autograd
lifealign      lifealign.kernels.sequence_logps

Every measurement has a process of its own: inputs are made, a small call warms up, and then one forward and backward
pass is timed. Extra memory is the process's peak of resident memory over that pass (VmHWM, reset before it) less what
was resident before. Implementations alternate; medians of --repeats are printed. CPU seconds, of all threads, are steadier
than elapsed ones on a machine that is shared.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from common import heading, load_average, matmul_rate, rate_line, resident, table, write_results  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from lifealign.kernels import sequence_logps  # noqa: E402

SEQUENCES = 8

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    token_logps = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return token_logps.new_zeros(SEQUENCES).index_add(0, sequence_ids, token_logps)


def torch_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sequence_ids: torch.Tensor
) -> torch.Tensor:
    token_logps = -cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    return token_logps.new_zeros(SEQUENCES).index_add(0, sequence_ids, token_logps)


def lifealign(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    return sequence_logps(hidden, weight, targets, sequence_ids, SEQUENCES)


HEADS: dict[str, Head] = {"naive": naive, "cross_entropy": torch_cross_entropy, "lifealign": lifealign}


def measure(name: str, tokens: int, vocab: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """One timed forward and backward pass in this process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocab, width, dtype=dtype).normal_(std=0.02, generator=generator)
    hidden = torch.empty(tokens, width, dtype=dtype).normal_(generator=generator).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    sequence_ids = torch.arange(tokens) * SEQUENCES // tokens
    scale = torch.linspace(-1, 1, SEQUENCES)
    few = torch.arange(0, tokens, max(1, tokens // 16))
    (HEADS[name](hidden[few], weight, targets[few], sequence_ids[few]) * scale).sum().backward()
    hidden.grad = None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes what is resident now
    started, cpu_started = time.perf_counter(), time.process_time()
    logps = HEADS[name](hidden, weight, targets, sequence_ids)
    (logps * scale).sum().backward()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    assert hidden.grad is not None
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_bytes": resident("VmHWM") - before,
        "logps": (logps * SEQUENCES / tokens).tolist(),  # a token, as a sequence's sum is large
        "gradient": hidden.grad[few].float().flatten()[:: max(1, width // 64)].tolist(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--one", choices=tuple(HEADS), help=argparse.SUPPRESS)  # a measuring process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.tokens, args.vocab, args.hidden, getattr(torch, args.dtype))))
        return 0

    load = os.getloadavg()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in HEADS}
    for _ in range(args.repeats):
        for name, measured in runs.items():
            command = [sys.executable, *sys.argv, "--one", name]
            measured.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    figures = ("seconds", "cpu_seconds", "extra_bytes")
    medians = {name: {key: statistics.median(m[key] for m in measured) for key in figures} for name, measured in runs.items()}
    differences = {
        name: {
            key: max(abs(a - b) for a, b in zip(runs[name][0][key], runs["naive"][0][key], strict=True))
            for key in ("logps", "gradient")
        }
        for name in HEADS
    }
    print(f"{args.tokens} tokens, vocabulary {args.vocab}, hidden {args.hidden}, {args.dtype}, forward and backward")
    print(
        table(
            [
                "",
                "extra MiB",
                "of naive",
                "seconds",
                "of naive",
                "CPU seconds",
                "of naive",
                "logp differs by",
                "gradient differs by",
            ],
            [
                [
                    name,
                    f"{own['extra_bytes'] / 2**20:.0f}",
                    f"{own['extra_bytes'] / medians['naive']['extra_bytes']:.3f}",
                    f"{own['seconds']:.2f}",
                    f"{own['seconds'] / medians['naive']['seconds']:.2f}",
                    f"{own['cpu_seconds']:.2f}",
                    f"{own['cpu_seconds'] / medians['naive']['cpu_seconds']:.2f}",
                    f"{differences[name]['logps']:.1e}",
                    f"{differences[name]['gradient']:.1e}",
                ]
                for name, own in medians.items()
            ],
        )
    )
    rate = matmul_rate(getattr(torch, args.dtype))
    print(rate_line({args.dtype: rate}))
    print(load_average())
    write_results(
        args.json,
        {
            **heading(load),
            "settings": {k: getattr(args, k) for k in ("tokens", "vocab", "hidden", "dtype", "repeats")},
            "matmul_flops_per_second": rate,
            "median": medians,
            "differences": differences,
            "runs": {name: [{k: m[k] for k in figures} for m in measured] for name, measured in runs.items()},
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
