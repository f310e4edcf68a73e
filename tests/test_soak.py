"""The soak of ``make soak``, in small: it kills where it says, and what it finds wrong it tells."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import command, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SLEEPER = """
import time
from pathlib import Path
from doomed import Doom
def inner():
    time.sleep(0.2)
doom = Doom(2, 0.05, {"what": "kill"}, Path("log"))
watched = doom.watch(inner)
watched()
print("once", flush=True)
watched()
print("twice", flush=True)
"""


def test_a_process_dies_inside_the_call_that_is_named(tmp_path: Path) -> None:
    names = {**environment(), "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run([sys.executable, "-c", SLEEPER], cwd=tmp_path, env=names, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert ended.stdout == "once\n"
    line = json.loads((tmp_path / "log").read_text())
    assert line == {"what": "kill", "call": 2, "after": 0.05, "doing": "inner"}


def test_a_few_kills_and_damage(tmp_path: Path) -> None:
    soak = (sys.executable, str(Path(__file__).with_name("soak.py")), "--kills", "3", "--ranks", "1", "--to", str(tmp_path))
    ended = command(*soak, "--corrupt", "0.9", timeout=1700)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert "'kills': 3, 'bit for bit': True" in ended.stdout
    lines = [json.loads(line) for line in (tmp_path / "run-0-ranks-1" / "kills.jsonl").read_text().splitlines()]
    assert {line["what"] for line in lines} == {"kill", "ended", "damage"}

    # A run that is not the same must not pass.
    scores = tmp_path / "run-0-ranks-1" / "run" / "scores.json"
    scores.write_text(scores.read_text().replace("0.", "1.", 1))
    again = command(*soak, "--corrupt", "0", timeout=600)
    assert again.returncode == 1
    assert "differs" in again.stdout and "scores.json" in again.stdout
