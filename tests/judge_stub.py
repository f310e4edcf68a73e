"""A judge that misbehaves on purpose: an OpenAI-compatible server on loopback, for tests.

What it does follows from the item's name, which it finds in the message as ``item-NUMBER``, and from how often it was asked
for that item, so a test knows beforehand what must come out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Faults = Callable[[str], Sequence[str]]
"""Item -> what goes wrong at its first attempts, in turn; a last FOR_EVER repeats the one before it."""

PLANS: tuple[tuple[str, ...], ...] = (
    ("429",),
    ("500",),
    ("garbage",),
    ("reset",),
    ("half",),
    ("slow",),
    ("429", "500", "garbage", "reset"),
    *[()] * 13,
)
"""A third of the items meet trouble."""

FOR_EVER = "for ever"
STALL_SECONDS = 30.0  # more than any client of a test waits
RETRY_AFTER = "0.1"


def grade(item: str) -> int:
    """The stub's grade of an item, 1 to 10."""
    return 1 + int(hashlib.sha256(f"grade of {item}".encode()).hexdigest(), 16) % 10


def trouble(item: str) -> Sequence[str]:
    """One of PLANS for each item, whatever the order in which they come."""
    return PLANS[hashlib.sha256(f"trouble of {item}".encode()).digest()[0] % len(PLANS)]


def well_behaved(item: str) -> Sequence[str]:
    return ()


class JudgeStub:
    """``with JudgeStub() as stub``: listens at ``stub.url`` inside.

    Args:
        faults: what goes wrong for an item, attempt by attempt.
        answer: the reply to a message that nothing goes wrong with; its item's grade by default.
        honours_keys: whether a usable reply is given again, and not counted again, to a request with the same Idempotency-Key.
    """

    def __init__(
        self, faults: Faults = well_behaved, answer: Callable[[str], str] | None = None, *, honours_keys: bool = False
    ) -> None:
        self.faults, self.answer = faults, answer or (lambda message: str(grade(name(message))))
        self.honours_keys, self.replied = honours_keys, set[str]()
        self.keys: dict[str, list[str]] = defaultdict(list)  # Idempotency-Key of requests, by item
        self.requests: Counter[str] = Counter()  # by item
        self.completions: Counter[str] = Counter()  # of usable replies, counted just before they are sent
        self.times: dict[str, list[float]] = defaultdict(list)  # of requests, by item
        self.authorizations: set[str] = set()
        self.headers: list[Message] = []  # of each request
        self.bodies: list[dict[str, Any]] = []
        self.before: Any = None  # what a test notes between two evaluations
        self.busiest = 0  # most requests that were under way at once
        self.reached: dict[int, threading.Event] = defaultdict(threading.Event)  # number of completions -> set when there
        self._busy, self._lock, self._over = 0, threading.Lock(), threading.Event()

    def __enter__(self) -> JudgeStub:
        stub = self

        class Handler(_Handler):
            judge = stub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def arrived(self, item: str, headers: Message, body: dict[str, Any]) -> str | None:
        """What goes wrong with this request, if anything."""
        with self._lock:
            attempt = self.requests[item]
            self.requests[item] += 1
            self.times[item].append(time.monotonic())
            self.authorizations.add(headers["Authorization"])
            self.headers.append(headers)
            self.keys[item].append(headers["Idempotency-Key"])
            self.bodies.append(body)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        plan = self.faults(item)
        if plan and plan[-1] == FOR_EVER:
            return plan[min(attempt, len(plan) - 2)]
        return plan[attempt] if attempt < len(plan) else None

    def left(self) -> None:
        with self._lock:
            self._busy -= 1

    def completed(self, item: str, key: str) -> None:
        with self._lock:
            if self.honours_keys and key in self.replied:
                return
            self.replied.add(key)
            self.completions[item] += 1
            self.reached[self.completions.total()].set()

    def settle(self) -> None:
        """Return once nothing is under way and nothing has arrived for a while."""
        seen = -1
        while self._busy or seen != self.requests.total():
            seen = self.requests.total()
            time.sleep(0.3)

    def stall(self, seconds: float) -> None:
        self._over.wait(seconds)


def name(message: str) -> str:
    found = re.search(r"item-\d+", message)
    return found[0] if found else hashlib.sha256(message.encode()).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed here, and connections reset; what else goes wrong is told."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeStub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": "no such place"}})
        message = body["messages"][-1]["content"]
        item = name(message)
        fault = self.judge.arrived(item, self.headers, body)
        try:
            if fault in (None, "slow", "late"):
                self.judge.stall(0.05 if fault == "slow" else 0)
                reply = self.judge.answer(message)
                self.judge.completed(item, self.headers["Idempotency-Key"])
                self.judge.stall(0.2 if fault == "late" else 0)  # billed, and not yet there
                self._send(200, completion(reply))
            else:
                self._misbehave(str(fault))
        finally:
            self.judge.left()

    def _misbehave(self, fault: str) -> None:
        if fault.isdigit():  # a status; servers are known to repeat what they were sent, the key included
            headers = {"Retry-After": RETRY_AFTER} if fault == "429" else {}
            self._send(int(fault), {"error": {"message": f"not now, {self.headers['Authorization']}"}}, headers)
        elif fault.startswith("wait "):
            self._send(429, {"error": {"message": "slower, please"}}, {"Retry-After": fault.removeprefix("wait ")})
        elif fault == "garbage":
            self._send(200, completion("I would give this a 7 out of 10."))
        elif fault == "html":
            self._send(200, "<html>proxy</html>")
        elif fault == "half":
            self._send(200, completion("7"), {}, missing=20)
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # closing the object alone would wait for its files, and say goodbye first
            self.close_connection = True
        elif fault == "stall":
            self.judge.stall(STALL_SECONDS)
            self.close_connection = True
        else:
            raise AssertionError(fault)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None, missing: int = 0) -> None:
        """``missing``: bytes at the end that are announced and never sent."""
        content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(content[: len(content) - missing])


def completion(reply: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "stub", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}
