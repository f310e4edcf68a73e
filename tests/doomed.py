"""launch/train.py, ended by SIGKILL inside a place that is named beforehand; or timed there, and left to end.

    DOOM='{"place": "saving", "rank": 0, "call": 2, "after": 0.004, "log": "kills.jsonl"}' python tests/doomed.py +sequence=...

kills the process 4 ms after rank 0 has begun to write its second checkpoint; where that is written before, half as long after
it has begun the next. A line of the log is written first: what the process was doing. Nothing is unwound and nothing flushed.
Without ``place`` every place is timed, into ``times-RANK.json`` beside the log.
"""

from lifealign.environment import prepare_process

prepare_process()

import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import wraps  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import lifealign.lifelong  # noqa: E402
from lifealign.command import hydra_command  # noqa: E402
from lifealign.evaluation.evaluate import Evaluator  # noqa: E402
from lifealign.lifelong import Lifelong  # noqa: E402
from lifealign.run import train  # noqa: E402
from lifealign.strategies.lifealign import LifeAlign  # noqa: E402
from lifealign.trainer import Trainer  # noqa: E402

PLACES: dict[str, tuple[Any, str]] = {
    "step": (Trainer, "step"),
    "saving": (Lifelong, "_write_checkpoint"),
    "consolidation": (LifeAlign, "end_stage"),
    "evaluation": (Evaluator, "evaluate"),
    "closing": (lifealign.lifelong, "save_adapter"),  # what a finished task leaves
    "between": (LifeAlign, "begin_task"),  # the first thing that a task does
    "resuming": (Lifelong, "_restore"),
}

AT_ONCE = 1e-3
"""Seconds that a thread may be late; before that the call is ended where it begins."""


class Doom:
    """Kills this process, so many seconds after a call began, if that call is still going on."""

    def __init__(self, call: int, after: float, told: dict[str, Any], log: Path) -> None:
        self.call, self.after, self.told, self.log = call, after, told, log
        self.calls, self.inside, self.lock = 0, False, threading.Lock()
        self.main = threading.get_ident()

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls < self.call:
                return function(*args, **kwargs)
            over = threading.Event()
            self.inside = True
            if self.after < AT_ONCE:
                self._strike(over)
            threading.Thread(target=self._strike, args=(over,), daemon=True).start()
            try:
                return function(*args, **kwargs)
            finally:
                with self.lock:  # a stroke that has begun holds it, and does not let go
                    self.inside = False
                self.after /= 2
                over.set()

        return watched

    def _strike(self, over: threading.Event) -> None:
        if self.after >= AT_ONCE and over.wait(self.after):
            return
        with self.lock:
            if self.inside:
                stack = traceback.extract_stack(sys._current_frames()[self.main])
                names = [frame.name for frame in stack]
                names = names[names.index("watched") + 1 :]
                doing = " > ".join(names if len(names) < 6 else [*names[:3], "...", *names[-2:]])
                line = json.dumps({**self.told, "call": self.calls, "after": self.after, "doing": doing})
                with open(self.log, "a") as file:
                    file.write(line + "\n")
                os.kill(os.getpid(), signal.SIGKILL)


def time_places(folder: Path, rank: int) -> None:
    """Note how long every call of every place takes."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[place].append(time.perf_counter() - started)
            if place == "saving":
                (folder / f"times-{rank}.json").write_text(json.dumps(seconds))
            return result

        return call

    for place, (owner, name) in PLACES.items():
        setattr(owner, name, timed(place, getattr(owner, name)))


if __name__ == "__main__":
    told = json.loads(os.environ["DOOM"])
    rank, log = int(os.environ.get("RANK", "0")), Path(told.pop("log"))
    if "place" not in told:
        time_places(log.parent, rank)
    elif told["rank"] == rank:
        sys.setswitchinterval(1e-4)  # so that it strikes in time
        owner, name = PLACES[told["place"]]
        doom = Doom(told.pop("call"), told.pop("after"), told, log)
        setattr(owner, name, doom.watch(getattr(owner, name)))
    hydra_command(train)
