"""A run with a judge among its metrics, from the configuration to its files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from judge_stub import JudgeStub
from support import QUICK, end_here, train_here

from lifealign.command import hydra_command
from lifealign.errors import Interrupted
from lifealign.rescore import rescore
from lifealign.run import train

CANARY = "canary-7d1f0c5be2"
JUDGED = (
    "strategy=seqft",
    "sft.epochs=1",
    "preference.epochs=0",
    "data.max_train=8",
    "data.max_eval=4",
    "evaluation.metrics=[judge]",
    "evaluation.max_new_tokens=4",
    "evaluation.judge.model=stub",
    "evaluation.judge.api_key_env=JUDGE_CANARY",
    "evaluation.judge.backoff=0.01",
)


def marked(message: str) -> str:
    """A grade for each answer: 3 or 8."""
    return "8" if len(message) % 2 else "3"


def test_a_run_is_judged_and_the_key_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four answers after the first task, eight after the second; some are the same, and those are asked once.

    Scored again, nothing is asked at all. The key reached the judge, and no file of the run or of wandb holds it.
    """
    monkeypatch.setenv("JUDGE_CANARY", CANARY)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    with JudgeStub(answer=marked) as stub:
        where = (f"evaluation.judge.base_url={stub.url}", f"cache.dir={tmp_path / 'cache'}", "tracking.mode=offline")
        run = train_here(tmp_path / "run", *JUDGED, *where)
        assert stub.authorizations == {f"Bearer {CANARY}"}
        asked = stub.requests.total()
        assert 0 < asked <= 12
        book = rescore(run, [])
        assert stub.requests.total() == asked
    matrix = json.loads((run / "scores.json").read_text())["metrics"]["judge"]["matrix"]
    grades = [json.loads(line) for line in (run / "tasks" / "02_hc3" / "predictions.jsonl").read_text().splitlines()]
    for on, task in enumerate(("instruct", "hc3")):
        own = [row["judge"] for row in grades if row["task"] == task]
        assert set(own) <= {3.0, 8.0}
        assert matrix[1][on] == pytest.approx(10 * sum(own) / len(own))
    assert book.matrix("judge") == matrix
    counts = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["scored"] for row in counts if row["kind"] == "judge"] == [4, 4, 4]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_signal_while_the_judge_is_asked_ends_after_the_replies_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sends SIGTERM with its first reply: to a training, in the scoring of its first task, and to a rescoring by
    another judge. Both end after that reply, with 143 and without a figure. Given again, each asks the rest: both judges
    were billed for each message once."""
    monkeypatch.setenv("JUDGE_CANARY", CANARY)
    kills = [signal.SIGTERM]

    def answer(message: str) -> str:
        if kills:
            os.kill(os.getpid(), kills.pop())
        return marked(message)

    run = tmp_path / "run"
    with JudgeStub(answer=answer) as stub:
        where = (f"evaluation.judge.base_url={stub.url}", f"cache.dir={tmp_path / 'cache'}", f"run.dir={run}")
        arguments = (*QUICK, *JUDGED, "evaluation.judge.concurrency=1", *where)
        ended = end_here(lambda: hydra_command(train), *arguments)
        assert (ended.code, ended.err.count("\n")) == (143, 1)
        assert "judge: stopped by SIGTERM, 3 of 4 questions have no verdict yet" in ended.err
        assert stub.requests.total() == 1 and not (run / "scores.json").exists()
        assert end_here(lambda: hydra_command(train), *arguments).code == 0
        assert set(stub.completions.values()) == {1}
        billed = stub.completions.total()

        kills.append(signal.SIGTERM)
        other = ["evaluation.judge.model=other"]
        with pytest.raises(Interrupted):
            rescore(run, other)
        assert stub.completions.total() == billed + 1 and not (run / "rescored" / "scores.json").exists()
        rescore(run, other)
    assert set(stub.completions.values()) == {2}


def test_a_run_goes_on_where_the_judge_can_grade_nothing_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored again by a judge that answers, it has the figures that it lacks."""
    monkeypatch.setenv("JUDGE_CANARY", CANARY)
    replies = ["no number"]
    with JudgeStub(answer=lambda message: replies[0] if replies else marked(message)) as stub:
        where = (f"evaluation.judge.base_url={stub.url}", f"cache.dir={tmp_path / 'cache'}", "evaluation.judge.attempts=1")
        run = train_here(tmp_path / "run", *JUDGED, *where)
        assert json.loads((run / "scores.json").read_text())["metrics"]["judge"]["matrix"] == [[None, None], [None, None]]
        replies.clear()
        assert rescore(run, []).matrix("judge")[1][1] is not None


def test_a_missing_key_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    arguments = (*QUICK, *JUDGED, "evaluation.judge.base_url=http://127.0.0.1:9/v1", f"run.dir={tmp_path / 'run'}")
    ended = end_here(lambda: hydra_command(train), *arguments)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "JUDGE_CANARY" in ended.err
    assert not list((tmp_path / "run").glob("checkpoints/*"))
