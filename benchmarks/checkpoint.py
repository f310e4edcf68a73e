"""What checkpoints cost the default run: saving while it goes, and taking up where it was.

    python benchmarks/checkpoint.py --json out.json
    python benchmarks/checkpoint.py --repeats 1 -- data.max_train=32 data.max_eval=8    # overrides stand behind --

Saving: runs with checkpoint.every=50 and with checkpoint.every=null take turns. What is claimed is the run's own timing of
saving as a share of its wall time, which holds all that it writes for going on: checkpoints within stages and between them,
adapters and scores. On a machine that is shared, the difference between the runs' wall times says less than that.

Resuming: a run is killed by SIGKILL after --steps steps and started again. What is claimed is how much later its first step
is logged after the start than that of a run that starts afresh; ``resuming`` is the run's own timing of reading and checking
the checkpoint and the memory.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from common import Claim, claims_json, claims_table, heading, load_average, matmul_rate, rate_line, table, write_results  # noqa: E402
from end_to_end import TRAIN, run_once  # noqa: E402

from lifealign.runtime.checkpoint import STATE, newest_folder  # noqa: E402
from lifealign.runtime.files import read_json  # noqa: E402

EVERY = {"every 50 steps": "checkpoint.every=50", "between phases alone": "checkpoint.every=null"}
PATIENCE = 900.0
"""Seconds within which a step must come."""

Figures = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=205, help="steps of the run that is killed; 205 lie within its third task")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("overrides", nargs="*", help="overrides of the run, behind --")
    args = parser.parse_args()
    load, rates = os.getloadavg(), [matmul_rate(torch.float32)]
    saving: dict[str, list[Figures]] = {name: [] for name in EVERY}
    resuming: list[Figures] = []
    for number in range(args.repeats):
        for name, every in EVERY.items():
            parts = run_once([*args.overrides, every])
            saving[name].append({**parts, "share": parts["saving"] / parts["wall"]})
            print(f"run {number + 1}, {name}: {parts['wall']:.1f} s, saving {parts['saving']:.2f} s", flush=True)
        resuming.append(resume_once(args.overrides, args.steps))
        print(f"run {number + 1}, killed: " + ", ".join(f"{k} {v:.2f} s" for k, v in resuming[-1].items()), flush=True)
        rates.append(matmul_rate(torch.float32))
    claims = report(saving, resuming)
    print(rate_line({"float32": statistics.median(rates)}))
    print(load_average())
    settings = {"repeats": args.repeats, "steps": args.steps, "overrides": args.overrides}
    figures = {"settings": settings, "claims": claims_json(claims), "saving": saving, "resuming": resuming}
    write_results(args.json, {**heading(load), **figures, "matmul_rates": {"float32": rates}})
    return 0


def resume_once(overrides: Sequence[str], steps: int) -> Figures:
    """Seconds until the first step of a run, of the same run once it was killed, and of what it did to take up."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        log, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
        command = [
            sys.executable,
            str(TRAIN),
            "+sequence=six_domains",
            f"run.dir={folder}",
            EVERY["every 50 steps"],
            *overrides,
        ]
        environment = {**os.environ, "LIFEALIGN_CACHE": str(Path(place) / "cache")}

        def first_step(steps_before: int, then: Callable[[], bool]) -> float:
            """Start, take the time of the first step, and kill the run once something has come about."""
            started = time.perf_counter()
            process = subprocess.Popen(command, env=environment, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
            try:
                _wait(process, lambda: steps_logged(log) > steps_before)
                seconds = time.perf_counter() - started
                _wait(process, then)
            finally:
                process.kill()
                process.wait()
            return seconds

        fresh = first_step(0, lambda: steps_logged(log) >= steps)
        newest = newest_folder(checkpoints)
        assert newest is not None, "there is nothing to go on from; more --steps"
        os.truncate(log, read_json(newest / STATE)["metrics_bytes"])  # as the run does, so that the next step is a new one
        resumed = first_step(steps_logged(log), lambda: newest_folder(checkpoints) != newest)
        left = newest_folder(checkpoints)
        assert left is not None
        resuming = read_json(left / STATE)["timing"]["resuming"]
    return {"fresh": fresh, "resumed": resumed, "later": resumed - fresh, "resuming": resuming}


def _wait(process: subprocess.Popen[bytes], come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not come():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the run has ended before it should, or stands still")
        time.sleep(0.01)


def steps_logged(log: Path) -> int:
    return log.read_bytes().count(b'"kind": "step"') if log.exists() else 0


def report(saving: Mapping[str, Sequence[Figures]], resuming: Sequence[Figures]) -> list[Claim]:
    """The tables; returns what is claimed."""
    rows = []
    for name, runs in saving.items():
        wall, seconds, share = (statistics.median(run[key] for run in runs) for key in ("wall", "saving", "share"))
        shares = [100 * run["share"] for run in runs]
        rows.append([name, f"{wall:.1f}", f"{seconds:.2f}", f"{100 * share:.2f} %", f"{min(shares):.2f}-{max(shares):.2f}"])
    print("\n" + table(["checkpoints", "wall s", "saving s", "share", "over runs"], rows) + "\n")
    parts = [[name, *(f"{run[name]:.2f}" for run in resuming)] for name in resuming[0]]
    print(table(["seconds until the first step", *(f"run {i + 1}" for i in range(len(resuming)))], parts) + "\n")
    often = saving["every 50 steps"]
    claims = [
        Claim("saving, of the run", 100 * statistics.median(run["share"] for run in often), 3, " %"),
        Claim("first step of a resumed run, later", statistics.median(run["later"] for run in resuming), 10, " s"),
    ]
    print(claims_table(claims) + "\n")
    return claims


if __name__ == "__main__":
    raise SystemExit(main())
