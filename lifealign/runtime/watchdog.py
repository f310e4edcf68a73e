"""Whether all ranks are there and get on: a thread of each tells rank 0 so, and rank 0 answers, once a second.

To those who wait in a collective, a rank that hangs, is stopped, or is behind a cut link looks like one that is slow. The
threads talk by datagrams over the network that the ranks meet on, so what cuts one cuts the other. Who finds that another is
silent, or holds all others up, names it and ends its process; rank 0 has all other ranks end as well.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from lifealign.errors import FAILURES
from lifealign.runtime import distributed
from lifealign.runtime.options import RuntimeOptions

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
PAUSED_SECONDS = 5.0
"""A watcher that did not come to look for so long was itself held up, and knows nothing of the others."""

MEETING_SECONDS = 5.0
"""How long a run waits at its start for the first datagrams; they take milliseconds, or do not come through."""

WAITING = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))
"""A main thread in files of these folders waits for other ranks."""

EXIT_CODE = 1
REST = "the newest checkpoint stands, and the same command goes on"


class Whereabouts:
    """What this process is doing, for a message that may have to name it; and a count of how often it got on."""

    def __init__(self) -> None:
        self.text, self.count = "", 0
        self.waits = False

    def say(self, text: str) -> None:
        self.text = text
        self.count += 1

    def tick(self) -> None:
        self.count += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the process waits for others, though it may look like one that works: on an accelerator a collective returns
        at once, and who asks for its result waits."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False


here = Whereabouts()
"""Of this process."""


@dataclass
class Seen:
    """The last that was heard of a rank."""

    at: float
    host: str
    where: str  # what it does
    stands: str  # the place in the code
    waiting: float  # seconds in which it has waited for others without getting on; 0: it does not wait

    def __str__(self) -> str:
        return f"on {self.host}, {self.where}"


@contextmanager
def watched(options: RuntimeOptions) -> Iterator[None]:
    """Inside, a rank that is silent or holds the others up is named, and all end. Called on every rank; nothing for one."""
    if distributed.world_size() == 1 or (options.silence_timeout is None and options.hang_timeout is None):
        yield
        return
    watch = _open(options)
    if watch is None:
        yield
        return
    watch.meet()
    thread = threading.Thread(target=watch.run, name="watchdog", daemon=True)
    thread.start()
    in_order = False
    try:
        yield
        in_order = True
    except FAILURES:  # met by all, of whom rank 0 may take long to close what it tells of the run elsewhere
        in_order = True
        raise
    finally:
        watch.done.set()
        thread.join(timeout=3 * BEAT_SECONDS)
        watch.leave(in_order)


def _open(options: RuntimeOptions) -> _Watch | None:
    """Rank 0 opens a port and tells the others of it. None, with a line in the log, where no port can be had."""
    host = "127.0.0.1" if os.environ.get("CROSS_SIZE") == "1" else os.environ.get("MASTER_ADDR", "127.0.0.1")
    port, place = None, None
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        port = socket.socket(family, socket.SOCK_DGRAM)
        port.settimeout(BEAT_SECONDS / 2)
        if distributed.is_main():
            _bind(port, address)
            place = host, port.getsockname()[1], secrets.token_hex(16)  # so that no stranger's datagram is heard
    except OSError as error:
        log.warning("nobody looks after this rank: no port for datagrams could be had (%s)", error)
    shared = distributed.broadcast_object(place)
    if shared is None or port is None:
        return None
    host, number, token = shared
    return _Watch(options, port, (host, number), token)


def _bind(port: socket.socket, address: Any) -> None:
    try:
        port.bind(address)
    except OSError:  # a name that leads here by way of another machine
        port.bind(("", 0))


@dataclass
class _Watch:
    options: RuntimeOptions
    port: socket.socket
    main: tuple[str, int]  # where rank 0 listens
    token: str
    done: threading.Event = field(default_factory=threading.Event)
    seen: dict[int, Seen] = field(default_factory=dict)  # of others, who have been heard at least once and have not left
    addresses: dict[int, Any] = field(default_factory=dict)  # of other ranks, where this is rank 0
    verdict: str | None = None
    _mark: tuple[Any, ...] = ()  # what the main thread did when it was last seen to get on
    _since: float = 0.0

    def meet(self) -> None:
        """Hear of each other once, so that a rank which falls silent from then on is missed."""
        wanted = set(range(1, distributed.world_size())) if distributed.is_main() else {0}
        deadline = time.monotonic() + MEETING_SECONDS
        while not wanted <= self.seen.keys() and time.monotonic() < deadline:
            self._beat()
            self._listen()
        self._beat()  # an answer to the last that was heard
        if missing := sorted(wanted - self.seen.keys()):
            log.warning("no datagrams of these ranks come through, and nobody here will notice their silence: %s", missing)

    def run(self) -> None:
        """Until it is done: tell, listen, judge."""
        told = looked = time.monotonic()
        while not self.done.is_set():
            now = time.monotonic()
            if now - looked > PAUSED_SECONDS:
                for seen in self.seen.values():
                    seen.at, seen.waiting = now, 0.0
            looked = now
            if now - told >= BEAT_SECONDS:
                told = now
                self._beat()
                self._judge()
            self._listen()

    def leave(self, in_order: bool) -> None:
        """Tell the others that from now on silence means nothing. Where an error ends this rank it does: they may wait."""
        for _ in range(3 if in_order else 0):  # datagrams may be lost
            self._send({"left": True})
        self.port.close()

    def _beat(self) -> None:
        own = self._own()
        self._send({"host": own.host, "where": own.where, "stands": own.stands, "waiting": own.waiting})

    def _send(self, what: dict[str, Any]) -> None:
        message = {"token": self.token, "rank": distributed.rank(), "verdict": self.verdict, **what}
        targets = list(self.addresses.values()) if distributed.is_main() else [self.main]
        for target in targets:
            with suppress(OSError):  # a network that is down now may be up again; if not, silence tells
                self.port.sendto(json.dumps(message).encode(), target)

    def _listen(self) -> None:
        try:
            content, address = self.port.recvfrom(1 << 16)
            message = json.loads(content)
            if message["token"] != self.token:
                return
        except (OSError, ValueError, KeyError, TypeError):  # nothing came, or nothing of ours
            return
        rank = message["rank"]
        if message.get("left"):
            self.seen.pop(rank, None)
            self.addresses.pop(rank, None)
            return
        if message["verdict"] is not None:
            os._exit(EXIT_CODE)  # rank 0 has told it
        self.seen[rank] = Seen(time.monotonic(), *(message[key] for key in ("host", "where", "stands", "waiting")))
        if distributed.is_main():
            self.addresses[rank] = address

    def _own(self) -> Seen:
        """What this rank has to say of itself."""
        now, frames = time.monotonic(), _frames(sys._current_frames().get(threading.main_thread().ident or 0))
        mark = here.count, *((frame.f_code, frame.f_lasti) for frame in frames)
        if mark != self._mark:
            self._mark, self._since = mark, now
        waits = here.waits or any(part in frame.f_code.co_filename for frame in frames for part in WAITING)
        inner = frames[0].f_code.co_name + f" ({os.path.basename(frames[0].f_code.co_filename)}, line {frames[0].f_lineno})"
        return Seen(now, socket.gethostname(), here.text, inner, now - self._since if waits else 0.0)

    def _judge(self) -> None:
        now, silence = time.monotonic(), self.options.silence_timeout
        for rank, seen in sorted(self.seen.items()):
            if silence is not None and now - seen.at > silence:
                why = "it is stopped, its machine is gone, or the network is cut"
                self._end(f"rank {rank} is silent for {now - seen.at:.0f} s (last seen {seen}): {why}")
        if distributed.is_main() and self.options.hang_timeout is not None:
            self._judge_waiting(self.options.hang_timeout)

    def _judge_waiting(self, limit: float) -> None:
        everyone = {0: self._own(), **self.seen}
        longest = max(seen.waiting for seen in everyone.values())
        if longest <= limit or len(everyone) < distributed.world_size():
            return
        busy = {rank: seen for rank, seen in everyone.items() if seen.waiting == 0.0}
        if busy:
            told = "; ".join(f"rank {rank} hangs ({seen}, in {seen.stands})" for rank, seen in busy.items())
        else:
            told = "all ranks wait for each other: " + "; ".join(
                f"rank {rank} ({seen}, in {seen.stands})" for rank, seen in everyone.items()
            )
        self._end(f"{told}; others have waited for {longest:.0f} s")

    def _end(self, told: str) -> None:
        """Say it, have the others end, and end: the main thread may be where nothing reaches it."""
        self.verdict = told
        print(f"error: {told}; {REST}", file=sys.stderr, flush=True)
        if distributed.is_main():
            for _ in range(3):
                self._beat()
                time.sleep(BEAT_SECONDS / 3)
        os._exit(EXIT_CODE)


def _frames(frame: FrameType | None) -> list[FrameType]:
    """From the innermost outwards."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found
