"""A training in which something goes wrong at a given place: ``python mishaps.py WHAT RANK [arguments of train.py]``."""

from __future__ import annotations

from lifealign.environment import prepare_process

prepare_process()

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from errno import ENOSPC  # noqa: E402

import lifealign.evaluation.generation as generation  # noqa: E402
from lifealign.command import hydra_command  # noqa: E402
from lifealign.run import train  # noqa: E402
from lifealign.runtime import distributed  # noqa: E402
from lifealign.runtime.tracking import Tracker  # noqa: E402
from lifealign.stages import Outcome, PreferenceStage  # noqa: E402

AT = 2
"""The call at which it goes wrong, counted from 1."""


def at_call(number: int, owner: object, name: str, act: Callable[[], object]) -> None:
    """``act`` before the so manieth call of a function."""
    usual: Callable[..., object] = getattr(owner, name)
    calls: list[None] = []

    def call(*arguments: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == number:
            act()
        return usual(*arguments, **options)

    setattr(owner, name, call)


def spoil_losses() -> None:
    """The losses of the second step's pairs, of which the first is no number. Two micro-batches of one rank are two calls."""
    usual, calls = PreferenceStage.outcome, []

    def outcome(self: PreferenceStage, *arguments: object) -> Outcome:
        calls.append(None)
        result = usual(self, *arguments)
        if len(calls) != AT:
            return result
        losses = result.losses.clone()
        losses[0] = losses[0] * float("nan")
        return result._replace(losses=losses)

    PreferenceStage.outcome = outcome


def refuse_to_write() -> None:
    raise OSError(ENOSPC, "No space left on device")


def hang() -> None:
    print(f"rank {distributed.rank()} hangs now", flush=True)
    while True:
        time.sleep(1)


MISHAPS: dict[str, Callable[[], None]] = {
    "nan": spoil_losses,
    "signal": lambda: at_call(AT, generation, "_generate_batch", lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "full": lambda: at_call(AT, Tracker, "_write", refuse_to_write),
    "hang": lambda: at_call(AT, PreferenceStage, "outcome", hang),
    "nothing": lambda: None,
}

if __name__ == "__main__":
    what, rank = sys.argv[1:3]
    del sys.argv[1:3]
    if distributed.rank() == int(rank):
        MISHAPS[what]()
    hydra_command(train)
