"""What a rank says of itself to those who look after it."""

from __future__ import annotations

import socket
import sys

import pytest

from lifealign.errors import UserError
from lifealign.runtime import watchdog
from lifealign.runtime.options import RuntimeOptions
from lifealign.runtime.watchdog import Whereabouts, _Watch


def test_who_asks_an_accelerator_for_the_result_of_a_collective_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread is then in no file of torch.distributed; so it says that it waits, and for how long it has."""
    here, clock = Whereabouts(), iter([10.0, 10.0, 17.0, 20.0])
    frame = (lambda: sys._getframe())()  # of a call that has returned: it stays where it is
    monkeypatch.setattr(watchdog, "here", here)
    monkeypatch.setattr(watchdog, "_frames", lambda _: [frame])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
        watch = _Watch(RuntimeOptions(), port, ("127.0.0.1", 1), "token")
        assert watch._own().waiting == 0.0, "it computes"
        with here.waiting():
            assert watch._own().waiting == 0.0
            assert watch._own().waiting == 7.0
        assert watch._own().waiting == 0.0


def test_a_limit_is_below_that_of_the_process_group() -> None:
    RuntimeOptions(hang_timeout=1799.0)
    with pytest.raises(UserError, match=r"^runtime\.hang_timeout=1800\.0: must be from 5 to below 1800 seconds"):
        RuntimeOptions(hang_timeout=1800.0)
