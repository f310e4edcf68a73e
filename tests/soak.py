"""A run that is killed again and again, and damaged, and goes on by itself to the end of one that was left in peace.

    python tests/soak.py --minutes 20                            # runs with 5 to 15 kills each, one after another
    python tests/soak.py --kills 60 --ranks 2 --corrupt 0        # one run with 60 kills
    python tests/soak.py --kills 60 --ranks 1 --to FOLDER        # again with the same FOLDER: goes on where it was

Kills are SIGKILLs: of one process (with --ranks 2 of one of the two ranks), at a random moment within a step, saving,
consolidation, evaluation, closing of a task, the start of the next, or resuming (tests/doomed.py), or at a random moment
after the start, whatever is going on. After each the same command is given again. With --corrupt, a random file of the
newest checkpoint or of the memory is cut, deleted, or a bit of it turned, between kills. With --forked, ranks are copies of
this process, started and ended by it as deepspeed's launcher does.

At the end the run must not differ in a bit from one that nothing happened to: adapters of all tasks, memory, scores,
predictions, logged figures. With --ranks any, where sums round differently, the adapter's distance is held to a thousandth
of its norm.
"""

from __future__ import annotations

import argparse
import atexit
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from endings import differences, distance, weights
from launches import Command, Forked, Launch
from support import REPOSITORY

from lifealign.runtime.checkpoint import DAMAGED, newest_folder

DOOMED = REPOSITORY / "tests" / "doomed.py"
SETTINGS = (
    "+sequence=six_domains",
    "data.max_train=48",
    "data.max_eval=8",
    "sft.batch_size=8",
    "sft.micro_batch_size=4",
    "preference.batch_size=8",
    "preference.micro_batch_size=4",
    "evaluation.max_new_tokens=8",
    "checkpoint.every=4",
    "checkpoint.keep=3",
    "tracking.mode=disabled",
    "cache.enabled=false",
)
PHASES = 18  # of six tasks, three each
LONGEST = 600.0
"""Seconds that a launch may take before it counts as hung."""
GONE = 60.0
"""Seconds after a kill within which no process may be left."""
CLOSE = 1e-3

Line = dict[str, Any]
Seconds = dict[int, dict[str, float]]
"""How long places take, by rank and place."""

SPARED: Line = {"place": "step", "rank": -1}
"""A launch that is not to kill itself."""


class Failed(Exception):
    """What the soak found."""


@dataclass
class Run:
    """A run directory, and all that has happened to it."""

    folder: Path
    log: Path

    def lines(self) -> list[Line]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def add(self, line: Line) -> None:
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")

    def newest(self) -> str:
        """Name of the newest checkpoint; "" where there is none."""
        found = newest_folder(self.folder / "checkpoints")
        return "" if found is None else found.name

    def phase(self) -> int:
        """Number of the phase that comes next, from 0."""
        return int(self.newest()[:5] or 0)


def start(run: Run, how: type[Launch], ranks: int, doom: Line) -> Launch:
    """The same command, whatever has happened."""
    names = {"OMP_NUM_THREADS": "1", "DOOM": json.dumps({**doom, "log": str(run.log)})}
    launch = how(DOOMED, SETTINGS, f"run.dir={run.folder}", ranks, names, run.log.with_suffix(".out"))
    atexit.register(launch.end)
    return launch


def finish(run: Run, launch: Launch) -> int:
    """Wait for a launch to end, and for all that it started; returns its exit code."""
    try:
        code = launch.wait(LONGEST)
    except TimeoutError as error:
        raise Failed(f"{run.folder}: still there after {LONGEST:.0f} s") from error
    if left := launch.left(GONE):
        raise Failed(f"{run.folder}: {left} processes are left {GONE:.0f} s after the command has ended")
    atexit.unregister(launch.end)
    return code


def choose(dice: random.Random, run: Run, kills: int) -> Line:
    """Where the next of so many kills is to fall: far ahead where the run has come less far than the kills have."""
    # The last is to fall in the last task and not after it: a run that is over too soon was killed too seldom.
    share = sum(line["what"] == "kill" for line in run.lines()) / (1.15 * kills)
    is_ahead, in_stage = run.phase() / PHASES > share, run.phase() % 3 < 2
    if in_stage:
        places = {"saving": 5, "step": 4, "consolidation": 1 if is_ahead else 6, "resuming": 1, "anywhere": 2}
    else:
        places = {"evaluation": 4, "closing": 2, "saving": 2, "resuming": 1, "anywhere": 1, "between": 0 if is_ahead else 6}
    (place,) = dice.choices(list(places), list(places.values()))
    most = {"step": 4 if is_ahead else 12, "saving": 1 if is_ahead else 3}.get(place, 1)
    return {"place": place, "call": dice.randint(1, most), "share": dice.random()}


def kill_once(run: Run, how: type[Launch], ranks: int, dice: random.Random, choice: Line, seconds: Seconds) -> bool:
    """Start the run and have it killed; False where it came to its end before that."""
    before, began = run.newest(), time.monotonic()
    rank = 0 if ranks == 1 or (choice["place"] == "saving" and dice.random() < 0.7) else dice.randrange(ranks)
    told = {"what": "kill", "place": choice["place"], "rank": rank, "ranks": ranks, "from": before}
    if choice["place"] == "anywhere":
        launch = start(run, how, ranks, SPARED)
        struck = _kill_after(launch, rank, choice["share"] * 1.5 * seconds[rank]["start"])
        if struck:
            run.add(told)
        code = finish(run, launch)
    else:
        known = len(run.lines())
        after = choice["share"] * seconds[rank][choice["place"]]
        code = finish(run, start(run, how, ranks, {**told, "call": choice["call"], "after": after}))
        struck = len(run.lines()) > known
    if not struck and code != 0:
        raise Failed(f"{run.folder}: ended with {code} by itself; {run.log.with_suffix('.out')} says why")
    if struck and ranks == 1 and code != -signal.SIGKILL:
        raise Failed(f"{run.folder}: was killed and ended with {code}")
    if struck and code == 0:
        raise Failed(f"{run.folder}: a rank was killed, and the command ended with 0")
    came_to = {"to": run.newest(), "partial": bool(list(run.folder.glob("checkpoints/*.partial")))}
    run.add({"what": "ended", "code": code, "seconds": round(time.monotonic() - began, 1), **came_to})
    return struck


def _kill_after(launch: Launch, rank: int, seconds: float) -> bool:
    """SIGKILL for a rank so long after the start; False where all has ended before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if launch.is_over():
            return False
        time.sleep(0.005)
    launch.kill(rank)
    return True


def corrupt(run: Run, dice: random.Random) -> None:
    """Damage a file that the run can do without: of the newest checkpoint where there is another, or of the memory."""
    checkpoints = sorted(path for path in run.folder.glob("checkpoints/0*") if DAMAGED not in path.name and path.is_dir())
    whole = [path for path in checkpoints if path.suffix != ".partial"]
    files = [path for path in run.folder.glob("memory/*/*") if path.suffix in (".json", ".safetensors")]
    files += run.folder.glob("memory/ledger.json")
    if len(whole) > 1:
        files += list(whole[-1].iterdir()) * 3
    if not files:
        return
    file, how = dice.choice(sorted(files)), dice.choice(("cut", "deleted", "turned"))
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: dice.randrange(len(content))])
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
    run.add({"what": "damage", "file": str(file.relative_to(run.folder)), "how": how})


def left_in_peace(folder: Path, how: type[Launch], ranks: int) -> tuple[Path, Seconds]:
    """A run that nothing happens to, and how long its places take: the median by rank; ``start`` is all of its first step."""
    run = Run(folder / f"whole-{ranks}" / "run", folder / f"whole-{ranks}" / "log")
    done = run.log.parent / "seconds.json"
    if not done.exists():
        shutil.rmtree(run.log.parent, ignore_errors=True)
        run.log.parent.mkdir(parents=True)
        began = time.monotonic()
        launch, first = start(run, how, ranks, {}), None
        while first is None and not launch.is_over():
            time.sleep(0.05)
            logged = run.folder / "metrics.jsonl"
            first = time.monotonic() - began if logged.exists() and '"step"' in logged.read_text() else None
        if finish(run, launch) != 0:
            raise Failed(f"{run.folder}: the run without kills failed; {run.log.with_suffix('.out')} says why")
        seconds = {}
        for rank in range(ranks):
            times = json.loads((run.log.parent / f"times-{rank}.json").read_text())
            seconds[rank] = {place: sorted(values)[len(values) // 2] for place, values in times.items()} | {"start": first}
        done.write_text(json.dumps({"run": time.monotonic() - began, **seconds}))
    read = json.loads(done.read_text())
    return run.folder, {rank: read[str(rank)] for rank in range(ranks)}


def soak(folder: Path, name: str, how: type[Launch], *, kills: int, ranks: str, seed: int, corruption: float) -> Line:
    """One run to its end; returns what came of it."""
    run = Run(folder / name / "run", folder / name / "kills.jsonl")
    run.log.parent.mkdir(parents=True, exist_ok=True)
    fixed = int(ranks) if ranks != "any" else None
    known = {number: left_in_peace(folder, how, number) for number in ((fixed,) if fixed else (1, 2))}
    done = sum(line["what"] == "kill" for line in run.lines())
    while done < kills:
        dice = random.Random(f"{seed}/{name}/{len(run.lines())}")
        if dice.random() < corruption:
            corrupt(run, dice)
        own = fixed or dice.choice((1, 2))
        if not kill_once(run, how, own, dice, choose(dice, run, kills), known[own][1]):
            break
        done += 1
        print(f"{name}: kill {done} of {kills}, {run.lines()[-2]['place']}, at {run.newest()}", flush=True)
    own = fixed or 1
    code = finish(run, start(run, how, own, SPARED))
    if code != 0:
        raise Failed(f"{run.folder}: ended with {code}; {run.log.with_suffix('.out')} says why")
    whole = known[own][0]
    if fixed:
        found = differences(run.folder, whole)
        if found:
            raise Failed(f"{run.folder}: differs from {whole} in {', '.join(found)}")
        return {"kills": done, "bit for bit": True}
    off = distance(weights(run.folder / "adapter"), weights(whole / "adapter"))
    if off > CLOSE:
        raise Failed(f"{run.folder}: its adapter lies {off:.2g} of its norm from that of {whole}")
    return {"kills": done, "distance": off}


def summary(lines: Sequence[Line]) -> str:
    """Counts by place, of kills and of damage."""
    kills = [line for line in lines if line["what"] == "kill"]
    places = Counter(line["place"] for line in kills)
    ended = [line for line in lines if line["what"] == "ended"]
    told = [f"{len(kills)} kills: " + ", ".join(f"{place} {count}" for place, count in places.most_common())]
    if any(line["ranks"] == 2 for line in kills):
        told.append("of rank 0 / 1: " + " / ".join(str(sum(line["rank"] == rank for line in kills)) for rank in (0, 1)))
    told.append(f"a half-written checkpoint was left by {sum(line['partial'] for line in ended)}")
    damaged = Counter(line["how"] for line in lines if line["what"] == "damage")
    if damaged:
        told.append("damage: " + ", ".join(f"{how} {count}" for how, count in damaged.most_common()))
    return "; ".join(told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="start runs for so long; not with --kills")
    parser.add_argument("--kills", type=int, help="one run, killed exactly so often")
    parser.add_argument("--ranks", choices=("1", "2", "any", "random"), default="random", help="random: one of these a run")
    parser.add_argument("--corrupt", type=float, default=0.2, help="probability of damage before a launch")
    parser.add_argument("--forked", action="store_true", help="fork ranks instead of starting commands: a start takes a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, help="for runs and logs; else a temporary folder, removed when all is well")
    args = parser.parse_args()
    folder = args.to or Path(tempfile.mkdtemp(prefix="soak-"))
    how: type[Launch] = Forked if args.forked else Command
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no launch outlives this process
    deadline, number = time.monotonic() + 60 * args.minutes, 0
    try:
        while number == 0 or (args.kills is None and time.monotonic() < deadline):
            dice = random.Random(f"{args.seed}/{number}")
            ranks = dice.choice(("1", "2", "any")) if args.ranks == "random" else args.ranks
            name, kills = f"run-{number}-ranks-{ranks}", args.kills or dice.randint(5, 15)
            print(f"{datetime.now(UTC):%H:%M:%S} {name}: {kills} kills", flush=True)
            came = soak(folder, name, how, kills=kills, ranks=ranks, seed=args.seed, corruption=args.corrupt)
            print(f"{datetime.now(UTC):%H:%M:%S} {name}: {came}", flush=True)
            print(summary(Run(Path(), folder / name / "kills.jsonl").lines()), flush=True)
            if args.kills is not None and came["kills"] < args.kills:
                raise Failed(f"{name}: it was over after {came['kills']} kills; another --seed, or fewer --kills")
            number += 1
    except Failed as failed:
        print(f"FAILED, and kept in {folder}: {failed}", flush=True)
        return 1
    if args.to is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
