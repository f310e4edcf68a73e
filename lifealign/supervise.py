"""Start a launcher of ranks and wait for every process that comes of it, so that the exit code tells of all of them.

``deepspeed`` starts a launcher of its own on each node and exits 0 where that one is killed, at once, while the ranks still
save. Linux hands the processes that lose their parent below this one to this one, if it asks for them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from lifealign.errors import SIGNALLED, UserError

PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>


def supervise(command: Sequence[str]) -> int:
    """Run a command to the end of all of its processes. Signals that ask for an end go to the command.

    Returns:
        Its exit code; where that is 0, the first other one of a process that it left behind.

    Raises:
        UserError: where there is no such command.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        started = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}") from error

    def pass_on(number: int, frame: FrameType | None) -> None:
        started.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    codes = {}
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            break
        codes[pid] = os.waitstatus_to_exitcode(status)
    own = _code(codes.pop(started.pid))
    return own or next((_code(code) for code in codes.values() if code), 0)


def _code(code: int) -> int:
    """As a shell says it: that of a process which a signal ended is above 128."""
    return SIGNALLED - code if code < 0 else code
