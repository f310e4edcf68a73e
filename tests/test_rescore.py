"""``launch/evaluate.py``: any adapter of a run, on its tasks or on other rows, with the answers that are there already."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import QUICK, REPOSITORY, Ended, command, compose_config, end_here, train_here

import lifealign.evaluation.evaluate as evaluate_module
from lifealign.assets import SIX_DOMAINS
from lifealign.config import build
from lifealign.errors import UserError
from lifealign.evaluation.text import bleu4_char
from lifealign.rescore import _check_adapter

METRICS = "evaluation.metrics=[preference_accuracy,chosen_nll,bleu4_char]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(tmp_path_factory.mktemp("trained") / "run", METRICS)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, since what is scored again leaves files in it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluate(run: Path, *words: str) -> Ended:
    return end_here(
        lambda: runpy.run_path(str(REPOSITORY / "launch" / "evaluate.py"), run_name="__main__"), f"run={run}", *words
    )


def done(run: Path, *words: str) -> str:
    ended = evaluate(run, *words)
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def matrix(folder: Path, metric: str) -> list[list[float | None]]:
    return json.loads((folder / "scores.json").read_text())["metrics"][metric]["matrix"]


@pytest.mark.parametrize("words", [(), ("adapter=hc3",)])
@pytest.mark.parametrize("to", ["", "tasks", "tasks/02_hc3"])
def test_a_runs_own_scores_are_not_written_over(run: Path, to: str, words: tuple[str, ...]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ended = evaluate(run, f"to={run / to}", "evaluation.metrics=[rouge_l]", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "name another folder" in ended.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# -- answers that are there already ------------------------------------------------------------------------------------


def test_where_nothing_changed_nothing_is_generated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first task 8 answers, after the second 16."""

    def generate(*_: object, **__: object) -> list[str]:
        raise AssertionError("an answer was generated that was there")

    monkeypatch.setattr(evaluate_module, "generate", generate)
    assert "answers: 24 taken over, 0 generated" in done(run)
    for metric in ("preference_accuracy", "bleu4_char"):
        assert matrix(run / "rescored", metric) == matrix(run, metric)
    for name in ("01_instruct", "02_hc3"):
        again = rows(run / "rescored" / f"{name}.predictions.jsonl")
        assert [(r["id"], r["prediction"]) for r in again] == [
            (r["id"], r["prediction"]) for r in rows(run / "tasks" / name / "predictions.jsonl")
        ]


def test_answers_of_the_run_are_taken_and_not_only_counted(run: Path) -> None:
    """Marked ones come back as they are, and are what is scored."""
    path = run / "tasks" / "02_hc3" / "predictions.jsonl"
    marked = [{**row, "prediction": "marked"} for row in rows(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in marked))
    done(run, "adapter=hc3")
    again = rows(run / "rescored" / "02_hc3" / "predictions.jsonl")
    assert {row["prediction"] for row in again} == {"marked"}
    scores = json.loads((run / "rescored" / "02_hc3" / "scores.json").read_text())["scores"]
    own = [row["chosen"] for row in again if row["task"] == "hc3"]
    assert scores["hc3"]["bleu4_char"] == pytest.approx(bleu4_char(["marked"] * len(own), own))


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        (("evaluation.max_new_tokens=5",), (0, 24)),  # decoded otherwise
        (("data.max_prompt_tokens=12",), (0, 24)),  # other prompts: all of the demonstration set are longer
        (("data.max_eval=10",), (24, 6)),  # two more rows, three times
        (("model.dtype=bfloat16",), (0, 24)),
    ],
)
def test_what_changed_is_generated_and_nothing_else(words: tuple[str, ...], counts: tuple[int, int], run: Path) -> None:
    told = "answers: {} taken over, {} generated"
    assert told.format(*counts) in done(run, *words)
    assert told.format(sum(counts), 0) in done(run, *words), "what an earlier scoring generated was not found"


def test_another_adapter_gets_answers_of_its_own(run: Path) -> None:
    path = run / "tasks" / "02_hc3" / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    first = next(name for name in factors if "lora_B" in name)
    factors[first][0, 0] += 1e-3
    save_file(factors, path, {"format": "pt"})
    assert "answers: 8 taken over, 16 generated" in done(run)


# -- adapters and rows -------------------------------------------------------------------------------------------------


def test_the_adapter_of_one_task_on_all_tasks(run: Path) -> None:
    out = done(run, "adapter=instruct")
    assert "answers: 8 taken over, 8 generated" in out
    assert not (run / "rescored" / "scores.json").exists(), "one adapter makes no matrix"
    left = run / "rescored" / "01_instruct"
    held = json.loads((left / "scores.json").read_text())
    own = json.loads((run / "tasks" / "01_instruct" / "scores.json").read_text())
    assert held["after"] == "instruct"
    assert held["scores"]["instruct"] == pytest.approx(own["scores"]["instruct"], abs=1e-4)
    assert set(held["scores"]) == {"instruct", "hc3"}
    assert [row["task"] for row in rows(left / "predictions.jsonl")] == ["instruct"] * 8 + ["hc3"] * 8


def test_rows_that_the_run_never_met(run: Path, tmp_path: Path) -> None:
    """Every adapter on every task of another set, with another metric."""
    for split in ("train", "test"):
        target = tmp_path / "set" / "jokes" / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SIX_DOMAINS / "safe_rlhf" / "test.jsonl", target)
    words = f"data.root={tmp_path / 'set'}", "sequence.tasks=[jokes]", "evaluation.metrics=[rouge_l,mean_log_sigmoid]"
    done(run, *words, f"to={tmp_path / 'scored'}")
    assert not (run / "rescored").exists()
    assert sorted(path.name for path in (tmp_path / "scored").iterdir()) == ["01_instruct", "02_hc3", "settings.yaml"]
    values = []
    for path in sorted((tmp_path / "scored").glob("0*")):
        scores = json.loads((path / "scores.json").read_text())["scores"]
        assert set(scores) == {"jokes"}
        assert set(scores["jokes"]) == {"rouge_l", "mean_log_sigmoid"}
        values.append(scores["jokes"]["mean_log_sigmoid"])
        assert len(rows(path / "predictions.jsonl")) == 8
    assert values[0] != values[1]


def test_an_interrupted_run(run: Path) -> None:
    shutil.rmtree(run / "tasks" / "02_hc3")
    (run / "scores.json").unlink()
    done(run)
    assert [len(row) for row in matrix(run / "rescored", "chosen_nll")] == [2]


@pytest.mark.slow
def test_several_ranks_share_the_work_and_agree(run: Path) -> None:
    """Three batches of pairs and of prompts a task for two ranks, with nothing taken over, and then with all."""
    script = str(REPOSITORY / "launch" / "evaluate.py")
    words = "evaluation.batch_size=3", "evaluation.max_new_tokens=6"
    ended = command("deepspeed", "--num_gpus", "2", script, f"run={run}", f"to={run / 'rescored' / 'two'}", *words)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("answers: 0 taken over, 24 generated") == 1
    done(run, *words, f"to={run / 'one'}", "adapter=hc3")  # which finds what two ranks have generated
    one = json.loads((run / "one" / "02_hc3" / "scores.json").read_text())["scores"]
    for metric in ("preference_accuracy", "chosen_nll", "bleu4_char"):
        two = matrix(run / "rescored" / "two", metric)[1]
        assert two == pytest.approx([one[task][metric] for task in ("instruct", "hc3")], abs=1e-3)
    known = rows(run / "rescored" / "two" / "02_hc3.predictions.jsonl")
    assert [row["prediction"] for row in rows(run / "one" / "02_hc3" / "predictions.jsonl")] == [r["prediction"] for r in known]
    shutil.rmtree(run / "rescored")
    shutil.rmtree(run / "one")
    assert "answers: 0 taken over, 16 generated" in done(run, *words, "adapter=hc3")
    alone = rows(run / "rescored" / "02_hc3" / "predictions.jsonl")
    assert [row["prediction"] for row in alone] == [row["prediction"] for row in known]


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("adapter=hc33",), "did you mean 'hc3'?"),
        (("adapter=",), "run=RUN_DIR"),
        (("adapter=hc3", "adapter=instruct"), "run=RUN_DIR"),
        (("model.lora.r=4",), "leave model.* as it is"),
        (("sequence.tasks=[hc4]",), "unknown task 'hc4'"),
    ],
)
def test_mistakes(words: tuple[str, ...], told: str, run: Path) -> None:
    ended = evaluate(run, *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert told in ended.err
    assert not (run / "rescored").exists()


def test_an_adapter_as_wide_as_its_sequence_needs_as_many_tasks() -> None:
    def composed(*words: str) -> Any:
        return build(compose_config(*QUICK, "strategy=olora", *words))

    _check_adapter(composed(), composed("sequence.tasks=[safe_rlhf,hc3]"))
    with pytest.raises(UserError, match="name 2 tasks"):
        _check_adapter(composed(), composed("sequence.tasks=[hc3]"))


def test_scores_made_with_other_settings_are_not_written_over(run: Path) -> None:
    done(run, "evaluation.metrics=[chosen_nll]")
    before = (run / "rescored" / "scores.json").read_bytes()
    ended = evaluate(run, "evaluation.metrics=[preference_accuracy]")
    assert ended.code == 2 and "holds scores made with another evaluation.metrics: ['chosen_nll'] ->" in ended.err
    assert "to=DIR" in ended.err and ended.err.count("\n") == 1
    assert (run / "rescored" / "scores.json").read_bytes() == before
    done(run, "evaluation.metrics=[preference_accuracy]", f"to={run / 'rescored' / 'accuracy'}")
    done(run, "evaluation.metrics=[chosen_nll]")  # the same again
    assert (run / "rescored" / "scores.json").read_bytes() == before


def test_a_scoring_that_came_to_nothing_is_given_again_with_other_settings(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a smaller batch, where memory was short."""

    def short(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(evaluate_module, "score_pairs", short)
    with pytest.raises(MemoryError):
        evaluate(run, "evaluation.metrics=[chosen_nll]")
    assert [path.name for path in (run / "rescored").iterdir()] == ["settings.yaml"]
    monkeypatch.undo()
    done(run, "evaluation.metrics=[chosen_nll]", "evaluation.batch_size=2")
