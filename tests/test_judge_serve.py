"""The judge against a real server that is none of ours: ``transformers serve`` with a small model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from bases import random_base
from judge_run import items
from transformers import AutoModelForCausalLM, AutoTokenizer

from lifealign.evaluation.judge import JudgeOptions, judge_answers

pytestmark = pytest.mark.slow

SERVE = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


def stubborn_judge(folder: Path) -> Path:
    """A model that says "7" whatever it reads: no layer adds anything, tokens are embedded alike, the head knows one."""
    random_base(folder, "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (seven,) = AutoTokenizer.from_pretrained(folder)("7", add_special_tokens=False).input_ids
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[seven] = 1.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    for package in ("fastapi", "uvicorn", "starlette"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-c", SERVE, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path / "serve.log"
    with open(log, "wb") as output:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 200
        while not _listens(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _listens(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_transformers_serve_is_a_judge(address: str, tmp_path: Path) -> None:
    """Its model says "7" and goes on for as long as it may: with one token that is a grade, with three none."""
    model = str(stubborn_judge(tmp_path / "judge"))
    given = {"base_url": address, "model": model, "timeout": 60.0, "concurrency": 2, "attempts": 1}

    def judged(tokens: int):
        options = JudgeOptions(**given, max_tokens=tokens)
        return judge_answers(options, items(3), task="instruct", folder=tmp_path / "kept")

    result = judged(1)
    assert (result.grades, result.score, result.failures, result.requests) == ([7.0] * 3, 70.0, {}, 3)
    assert judged(1).requests == 0
    assert judged(3).failures == {"unparsable reply": 3}
