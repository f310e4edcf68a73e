"""Consolidation (SLMC): time, memory and error beside a loop over tensors with full decompositions.

    python benchmarks/slmc.py adapter --json out.json      # q/v factors of rank 8 of a 7B model, 12 stored updates
    python benchmarks/slmc.py all-linear --json out.json   # all linear layers at rank 64: 161 M numbers an update
    python benchmarks/slmc.py ranks --json out.json        # two ranks of a thread each beside one
    python benchmarks/slmc.py grid --json out.json         # rank x targets x stored updates

ours  FactorConsolidator.consolidate: finite checks, truncation, refinement, the new value, the record and the longer history
loop  the way of the released research code, as a reference in few lines: for each factor by itself a thin float32 SVD of
      the update, and one of all its earlier updates, flattened and stacked, all right singular vectors as the basis.
      "full" is the same loop with torch's default for the first SVD, square matrices of vectors; nobody's code does that

Shapes are Qwen2.5-7B's. Updates are random with singular values falling as 1/i, and 22 % of the energy of each lies in the
span of those before it. Both take turns on the same numbers, after one call that is not timed (`grid`
calls the loop once, cold). Between calls the history is
cut back to the same stored updates, by its length alone, so that each call is the consolidation of the same next update.
Extra memory is the process's peak of resident memory over the first call less what was resident before it, with freed memory
handed back to the system first: results and the longer history count, inputs and the stored history do not. Each part writes
its own entry of the JSON file.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import zlib  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable, Iterable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from common import (  # noqa: E402
    Claim,
    claims_json,
    claims_table,
    heading,
    load_average,
    table,
    take_turns,
    timed,
    write_results,
)

from lifealign.memory import ConsolidationOptions, FactorConsolidator, refine  # noqa: E402
from lifealign.runtime import distributed  # noqa: E402

Factors = dict[str, torch.Tensor]
Shapes = dict[str, torch.Size]

HIDDEN, KEY_VALUE, MLP = 3584, 512, 18944
WIDTHS = {  # inputs and outputs of a layer's modules
    "q": (HIDDEN, HIDDEN),
    "k": (HIDDEN, KEY_VALUE),
    "v": (HIDDEN, KEY_VALUE),
    "o": (HIDDEN, HIDDEN),
    "gate": (HIDDEN, MLP),
    "up": (HIDDEN, MLP),
    "down": (MLP, HIDDEN),
}
OPTIONS = ConsolidationOptions()
PAST_SHARE = 0.22  # of an update's energy, in the span of those before
GRID_SECONDS = 20.0  # after which the loop is broken off


# Factors and their updates


def factor_shapes(modules: Iterable[str], layers: int, rank: int) -> Shapes:
    shapes = {}
    for layer in range(layers):
        for module in modules:
            inputs, outputs = WIDTHS[module]
            shapes[f"{layer}.{module}.A"] = torch.Size((rank, inputs))
            shapes[f"{layer}.{module}.B"] = torch.Size((outputs, rank))
    return shapes


def updates(name: str, shape: torch.Size) -> Iterator[torch.Tensor]:
    """Updates of one factor, of norm 0.2, each partly a combination of those before it; a function of the name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    short, long = sorted(shape)
    decay = 1 / torch.arange(1, short + 1)
    past = torch.zeros(short, long)
    while True:
        fresh = torch.randn(short, short, generator=generator).mul_(decay) @ torch.randn(short, long, generator=generator)
        fresh *= (1 - PAST_SHARE) ** 0.5 / fresh.norm()
        fresh += past * (PAST_SHARE**0.5 / past.norm().clamp(min=1e-9))
        past = fresh.add(past, alpha=0.7)
        yield 0.2 / fresh.norm() * (fresh if fresh.shape == shape else fresh.mT).contiguous()


class Loop:
    """The contender: every factor by itself, and nothing of one call serves the next but the raw history."""

    def __init__(self) -> None:
        self.history: dict[str, list[torch.Tensor]] = defaultdict(list)

    def consolidate(self, before: Factors, after: Factors, most_seconds: float, full: bool) -> Factors:
        values, started = {}, time.perf_counter()
        for name, start in before.items():
            if time.perf_counter() - started > most_seconds:
                break
            u, s, vt = torch.linalg.svd(after[name] - start, full_matrices=full)
            energy = s.square().cumsum(0)
            keep = int((energy < OPTIONS.energy * energy[-1]).sum()) + 1
            flat = ((u[:, :keep] * s[:keep]) @ vt[:keep]).flatten()
            known = torch.linalg.svd(torch.stack(self.history[name]), full_matrices=False).Vh
            flat = flat - (1 - OPTIONS.scale) * (known.T @ (known @ flat))
            self.history[name].append(flat)
            values[name] = start + flat.view_as(start)
        return values


class Stage:
    """Both contenders with the same history, and the factors before and after the next update; of the factors of this rank.

    Args:
        in_loop: factors that the loop takes; None: all.
    """

    def __init__(self, shapes: Shapes, stored: int, in_loop: Iterable[str] | None = None) -> None:
        self.stored = stored
        self.ours, self.loop = FactorConsolidator(shapes, OPTIONS), Loop()
        self.in_loop = list(shapes if in_loop is None else in_loop)
        streams = {name: updates(name, shape) for name, shape in shapes.items() if name in self.ours.owned}
        for _ in range(stored):
            update = {name: next(stream) for name, stream in streams.items()}
            self.ours.remember(update)
            for name in self.in_loop:
                self.loop.history[name].append(update[name].flatten())
        self.before = {name: torch.linspace(-0.02, 0.02, shapes[name].numel()).view(shapes[name]) for name in streams}
        self.after = {name: self.before[name] + next(stream) for name, stream in streams.items()}

    def run_ours(self) -> Factors:
        for _, basis in self.ours._bases:
            basis.size = self.stored
        return self.ours.consolidate(self.before, self.after).values

    def run_loop(self, most_seconds: float = float("inf"), full: bool = False) -> Factors:
        for history in self.loop.history.values():
            del history[self.stored :]
        return self.loop.consolidate({name: self.before[name] for name in self.in_loop}, self.after, most_seconds, full)

    def error(self, values: Factors) -> float:
        """Largest relative error of a refined update, beside the float64 reference; of the loop's factors."""
        worst = 0.0
        for name in self.in_loop:
            before, change = self.before[name].double(), (self.after[name] - self.before[name]).double()
            history = [past.view(change.shape).double() for past in self.loop.history[name][: self.stored]]
            exact = refine(change, history, energy=OPTIONS.energy, scale=OPTIONS.scale)
            worst = max(worst, ((values[name].double() - before - exact).norm() / exact.norm()).item())
        return worst


Part = tuple[dict[str, Any], list[Claim]]


# Parts


def adapter(args: argparse.Namespace) -> Part:
    stage = Stage(factor_shapes("qv", args.layers or 28, 8), 12)
    calls = {"ours": stage.run_ours, "loop": stage.run_loop, "loop, full": lambda: stage.run_loop(full=True)}
    found = take_turns(calls, args.repeats)
    for own in found.values():
        own["error"] = stage.error(own.pop("result"))
    ours, loop = found["ours"], found["loop"]
    numbers = sum(value.numel() for value in stage.before.values())
    print(f"{len(stage.before)} factors, {numbers:,} numbers, {stage.stored} stored updates")
    rows = [
        [name, f"{own['seconds'] * 1e3:.1f}", f"{own['extra_bytes'] / 2**20:.0f}", f"{own['error']:.1e}"]
        for name, own in found.items()
    ]
    print(table(["", "ms", "extra MiB", "largest relative error"], rows))
    claims = [
        Claim("time", ours["seconds"] * 1e3, 150, " ms"),
        Claim("faster than the loop", loop["seconds"] / ours["seconds"], 50, "x", at_least=True),
        Claim("largest relative error", ours["error"], 1e-5, ""),
    ]
    return found, claims


def all_linear(args: argparse.Namespace) -> Part:
    """The loop takes one layer only: its figures are those of a layer, and nothing is made of them."""
    shapes = factor_shapes(WIDTHS, args.layers or 28, 64)
    stage = Stage(shapes, 12, in_loop=factor_shapes(WIDTHS, 1, 64))
    found = take_turns({"ours": stage.run_ours}, args.repeats)
    values = found["ours"].pop("result")
    error = stage.error(values)
    del values
    found |= take_turns({"loop, one layer": stage.run_loop}, 1)
    del found["loop, one layer"]["result"]
    numbers = sum(shape.numel() for shape in shapes.values())
    print(f"{len(shapes)} factors, {numbers:,} numbers, {stage.stored} stored updates; an update is {4 * numbers / 1e9:.2f} GB")
    rows = []
    for (name, own), factors in zip(found.items(), (len(shapes), len(stage.in_loop)), strict=True):
        each = f"{own['seconds'] / factors * 1e3:.1f}"
        rows.append([name, str(factors), f"{own['seconds']:.2f}", each, f"{own['extra_bytes'] / 1e9:.2f}"])
    print(table(["", "factors", "seconds", "ms a factor", "extra GB"], rows))
    claims = [
        Claim("time", found["ours"]["seconds"], 6, " s"),
        Claim("extra memory", found["ours"]["extra_bytes"] / 1e9, 2.5, " GB"),
    ]
    return {**found, "error_of_one_layer": error, "update_bytes": 4 * numbers}, claims


def ranks(args: argparse.Namespace) -> Part:
    """Processes over gloo, a thread each; from barrier to barrier, consolidation and the exchange of refined values."""
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(3):
        for world, done in runs.items():
            done.append(launch(world, args.layers or 4, args.stored, args.repeats))
    seconds = {world: median(s for run in done for s in run["seconds"]) for world, done in runs.items()}
    exchange = {world: median(s for run in done for s in run["exchange_seconds"]) for world, done in runs.items()}
    differs = max(abs(a - b) for a, b in zip(runs[1][0]["sample"], runs[2][0]["sample"], strict=True))
    print(f"all linear layers of {args.layers or 4} layers, rank 64, {args.stored} stored; values differ by {differs:.1e}")
    rows = [[str(world), f"{seconds[world]:.3f}", f"{exchange[world]:.3f}"] for world in runs]
    print(table(["ranks", "seconds", "of it exchange"], rows))
    all_seconds = {world: [run["seconds"] for run in done] for world, done in runs.items()}
    figures = {
        "stored": args.stored,
        "seconds": seconds,
        "exchange_seconds": exchange,
        "all_seconds": all_seconds,
        "values_differ_by": differs,
    }
    return figures, [Claim("two ranks beside one", seconds[1] / seconds[2], 1.7, "x", at_least=True)]


def launch(world: int, layers: int, stored: int, repeats: int) -> dict[str, Any]:
    """What rank 0 of a group of this size prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "rank", "--layers", str(layers)]
    command += ["--stored", str(stored), "--repeats", str(repeats)]
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE)
        for r in range(world)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed")
    return json.loads(outputs[0])


def one_rank(args: argparse.Namespace) -> None:
    """A measuring process of ``ranks``."""
    distributed.start()
    shapes = factor_shapes(WIDTHS, args.layers, 64)
    stage = Stage(shapes, args.stored, in_loop=())
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    seconds, exchange = [], []
    for _ in range(1 + args.repeats):
        distributed.barrier()
        started = time.perf_counter()
        values = stage.run_ours()
        distributed.barrier()
        refined = time.perf_counter()
        for name, value in values.items():
            parameters[name].copy_(value)
        for owner in range(distributed.world_size()):
            distributed.broadcast_all([p for name, p in parameters.items() if stage.ours.owners[name] == owner], owner)
        distributed.barrier()
        seconds.append(time.perf_counter() - started)
        exchange.append(time.perf_counter() - refined)
    if distributed.is_main():
        sample = torch.cat([p.flatten()[::9973] for p in parameters.values()]).tolist()
        print(json.dumps({"seconds": seconds[1:], "exchange_seconds": exchange[1:], "sample": sample}))
    distributed.stop()


def grid(args: argparse.Namespace) -> Part:
    targets = {"q/v, 28 layers": ("qv", 28), "all linear, 4 layers": (WIDTHS, 4)}
    found: dict[str, Any] = {}
    rows = []
    for target, (modules, layers) in targets.items():
        for rank in (8, 64):
            for stored in (1, 12, 48):
                stage = Stage(factor_shapes(modules, args.layers or layers, rank), stored)
                ours = take_turns({"ours": stage.run_ours}, args.repeats)["ours"]["seconds"]
                seconds, values = timed(lambda s=stage: s.run_loop(GRID_SECONDS))
                done, factors = len(values), len(stage.before)
                spent = f"{seconds * 1e3:.0f}" if done == factors else f"over {GRID_SECONDS:.0f} s"
                ratio = f"{seconds / ours:.1f}x" if done == factors else f"{done} of {factors} factors"
                figures = {"ours_seconds": ours, "loop_seconds": seconds, "loop_factors": done, "factors": factors}
                found[f"{target}, rank {rank}, {stored} stored"] = figures
                rows.append([target, str(rank), str(stored), f"{ours * 1e3:.1f}", spent, ratio])
                del stage, values
    print(table(["targets", "rank", "stored", "ours, ms", "loop, ms", "ratio"], rows))
    return found, []


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "adapter": adapter,
    "all-linear": all_linear,
    "ranks": ranks,
    "grid": grid,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "rank"), metavar="|".join(PARTS))
    parser.add_argument("--layers", type=int, help="of the model, in place of the part's own number")
    parser.add_argument("--stored", type=int, default=12, help="updates before the one that is timed; of `ranks`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures; other parts' entries stay")
    args = parser.parse_args()
    if args.part == "rank":
        one_rank(args)
        return 0
    load = os.getloadavg()
    figures, claims = PARTS[args.part](args)
    if claims:
        print("\n" + claims_table(claims))
    print(load_average())
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    write_results(args.json, {**known, args.part: {**heading(load), "claims": claims_json(claims), "figures": figures}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
