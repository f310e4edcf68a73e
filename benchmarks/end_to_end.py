"""The default run from outside: wall time of the six tasks, and what it is spent on.

    python benchmarks/end_to_end.py --json out.json
    python benchmarks/end_to_end.py --repeats 1 -- data.max_train=32 data.max_eval=8    # overrides stand behind --

Starts ``python launch/train.py +sequence=six_domains`` in a run directory of its own, with an empty cache of reference
log-probabilities, and takes the time from before the process starts until it has ended. Seconds and shares are medians
over --repeats, each of its own figures.

before loading    imports, configuration, process group: until the first phase is logged, less loading
loading ... saving  the run's own timing, from its last checkpoint
closing           from the last checkpoint until the process has ended: the report, the tracker, leaving
unaccounted       the rest of wall time, such as the engines that stages make

Start-up ends when ``run.log`` says that the first phase begins; the first engine is made after that.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import datetime  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from common import heading, load_average, matmul_rate, rate_line, table, write_results  # noqa: E402

from lifealign.runtime.checkpoint import STATE, newest_folder  # noqa: E402
from lifealign.runtime.files import read_json  # noqa: E402

TRAIN = Path(__file__).resolve().parents[1] / "launch" / "train.py"
WORK = ("sft", "reference", "preference", "evaluation")
MEMORY = ("consolidation", "saving")
TIMED = ("loading", *WORK, *MEMORY, "tracking")  # by the run itself
LIMITS = {  # claim -> (figure, limit, whether it is a least), in shares of wall time or seconds
    "sft + reference + preference + evaluation": ("work_share", 0.85, True),
    "start-up": ("start_up", 15.0, False),
    "SLMC + saving": ("memory_share", 0.03, False),
}

Parts = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("overrides", nargs="*", help="overrides of the run, behind --")
    args = parser.parse_args()
    load, runs, rates = os.getloadavg(), [], [matmul_rate(torch.float32)]
    for number in range(args.repeats):
        runs.append(run_once(args.overrides))
        rates.append(matmul_rate(torch.float32))
        print(f"run {number + 1}: {runs[-1]['wall']:.1f} s, start-up {runs[-1]['start_up']:.1f} s", flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    report(args, runs, medians)
    print(rate_line({"float32": statistics.median(rates)}))
    print(load_average())
    figures = {"settings": {"repeats": args.repeats, "overrides": args.overrides}, "median": medians, "runs": runs}
    write_results(args.json, {**heading(load), **figures, "matmul_rates": {"float32": rates}})
    return 0


def run_once(overrides: Sequence[str]) -> Parts:
    """Seconds of one run by part, with ``wall``, ``start_up`` and the shares that are claimed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        command = [sys.executable, str(TRAIN), "+sequence=six_domains", f"run.dir={folder}", *overrides]
        environment = {**os.environ, "LIFEALIGN_CACHE": str(Path(place) / "cache")}
        began, started = time.time(), time.perf_counter()
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
        wall, ended = time.perf_counter() - started, time.time()
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        start_up = first_phase(folder / "run.log") - began
        left = newest_folder(folder / "checkpoints")
        assert left is not None, "a finished run has a checkpoint"
        closing, state = ended - (left / STATE).stat().st_mtime, read_json(left / STATE)
    timing = {name: state["timing"].get(name, 0.0) for name in TIMED}
    parts = {"before loading": start_up - timing["loading"], **timing, "closing": closing}
    parts["unaccounted"] = wall - sum(parts.values())
    share = lambda names: sum(timing[name] for name in names) / wall  # noqa: E731
    shares = {"work_share": share(WORK), "memory_share": share(MEMORY)}
    return {**parts, "wall": wall, "start_up": start_up, **shares}


def first_phase(log: Path) -> float:
    """When the first phase began, in seconds since the epoch."""
    found = re.search(r"^(\S+ \S+),(\d{3}) .* task 1 of \d+ ", log.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{log.name} does not say when the first task began"
    return datetime.datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(found[2]) / 1000


def report(args: argparse.Namespace, runs: Sequence[Parts], medians: Parts) -> None:
    """The table of parts, and what is claimed of them."""
    parts = [name for name in medians if name not in ("start_up", "work_share", "memory_share")]
    rows = []
    for name in parts:
        seconds, share = [run[name] for run in runs], statistics.median(run[name] / run["wall"] for run in runs)
        rows.append([name, f"{medians[name]:.2f}", f"{100 * share:.1f} %", f"{min(seconds):.2f}-{max(seconds):.2f}"])
    print(f"\n+sequence=six_domains {' '.join(args.overrides)}".rstrip() + f", {args.repeats} runs")
    print(table(["", "seconds", "of wall", "over runs"], rows) + "\n")
    claims = []
    for claim, (figure, limit, least) in LIMITS.items():
        value, in_seconds = medians[figure], figure == "start_up"
        holds = value >= limit if least else value < limit
        written = [f"{x:.1f} s" if in_seconds else f"{100 * x:.1f} %" for x in (value, limit)]
        claims.append([claim, written[0], f"{'at least' if least else 'below'} {written[1]}", "yes" if holds else "no"])
    print(table(["", "measured", "claimed", "holds"], claims))


if __name__ == "__main__":
    raise SystemExit(main())
