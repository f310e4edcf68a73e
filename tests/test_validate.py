"""``launch/validate.py``: what it says of lengths, masks, batches, memory, disk and work is what a run then does."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bases import random_base
from safetensors.torch import load_file
from support import QUICK, REPOSITORY, Ended, compose_config, end_here, train_here
from transformers import AutoTokenizer

import lifealign.validate.estimate as estimate_module
from lifealign.assets import SIX_DOMAINS, TINY_MODEL
from lifealign.config import Config, build
from lifealign.data.options import DataOptions
from lifealign.data.tasks import Task, load_tasks
from lifealign.data.tokenize import Pair
from lifealign.runtime.checkpoint import newest_folder
from lifealign.runtime.files import read_json
from lifealign.validate.estimate import FLOAT32, estimate, layer_rate, product_rate
from lifealign.validate.examples import CLOSE, OPEN, SHOWN, example, visible
from lifealign.validate.lengths import LengthRecorder, histogram, length_table
from lifealign.validate.work import plan_work

TOKENIZER = AutoTokenizer.from_pretrained(TINY_MODEL)
MARK = re.compile(f"{OPEN}(.*?){CLOSE}")


def validate(*words: str) -> Ended:
    return end_here(lambda: runpy.run_path(str(REPOSITORY / "launch" / "validate.py"), run_name="__main__"), *QUICK, *words)


def told(ended: Ended) -> str:
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    return ended.err


def cells(out: str, first: str) -> list[str]:
    """The cells of the first table row that begins with ``first``."""
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in out.splitlines() if "│" in line]
    return next(row[1:] for row in rows if row[0] == first)


def loaded(*overrides: str) -> tuple[Config, list[Task]]:
    config = build(compose_config(*QUICK, *overrides))
    return config, load_tasks(config.sequence, config.data, TOKENIZER, SIX_DOMAINS)


# -- lengths -----------------------------------------------------------------------------------------------------------


def test_histogram_by_hand() -> None:
    """Of 1, 2, 3, 4, 4, 5: one up to 1, one up to 2, three up to 4 (a whole bar of 20), one up to 8."""
    bars = histogram([1, 2, 3, 4, 4, 5], [1, 2, 4, 8])
    assert [bar.count("█") for bar in bars] == [7, 7, 20, 7]
    assert [bar.split()[-2] for bar in bars] == ["16.7", "16.7", "50.0", "16.7"]


def test_lengths_are_those_before_the_cut() -> None:
    """Responses of 1, 4, 2 and 3 behind prompts of 5 and 3; beyond limits of 3 and 2 lie one prompt and two responses."""

    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * int(text) for text in texts]}

    recorder = LengthRecorder(tokenizer)
    recorder(["5", "6", "9", "3", "5", "6"], verbose=False)
    recorder(["7"], verbose=False)
    assert (recorder.prompts, recorder.responses) == ([5, 3], [1, 4, 2, 3])
    table = length_table(recorder, DataOptions(max_prompt_tokens=3, max_response_tokens=2))
    _, prompts, responses = (list(column.cells) for column in table.columns)
    assert prompts[-4:] == ["5", "3", "1 of 2 (50.0 %)", "2 of 8 (25.0 %)"]
    assert responses[-4:] == ["4", "2", "2 of 4 (50.0 %)", "3 of 10 (30.0 %)"]


def test_lengths_are_those_of_pairs() -> None:
    recorder = LengthRecorder(TOKENIZER)
    config = build(compose_config(*QUICK))
    tasks = load_tasks(config.sequence, config.data, recorder, SIX_DOMAINS)
    pairs = [pair for task in tasks for pair in [*task.train, *task.test]]
    assert sorted(recorder.prompts) == sorted(len(pair.prompt) for pair in pairs)
    ends = {TOKENIZER.eos_token_id}
    assert {pair.chosen[-1] for pair in pairs} == ends  # written by the template, so counted
    assert sorted(recorder.responses) == sorted(len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected))


def test_what_a_limit_cuts_is_told() -> None:
    whole, cut = validate(), validate("data.max_response_tokens=12")
    assert (whole.code, cut.code) == (0, 0)
    assert [cell.split()[0] for cell in (*cells(whole.out, "longer"), cells(cut.out, "longer")[0])] == ["0", "0", "0"]
    count, _, of, _, _ = cells(cut.out, "longer")[1].split()
    assert 0 < int(count) <= int(of) == 2 * 2 * (16 + 8)  # tasks, responses, pairs
    assert [int(cells(out, "hc3")[-1]) for out in (whole.out, cut.out)] == [0, 24]


# -- examples ----------------------------------------------------------------------------------------------------------


def test_marks_are_the_response_and_nothing_else() -> None:
    """Unmarked is the template's prompt, marked the answer with its end token, as the template writes them."""
    _, tasks = loaded()
    pair = tasks[0].train[0]
    _, chosen, rejected = re.split(r"chosen \(both stages\)|rejected \(preference stage\)", example(pair, TOKENIZER, "x").plain)
    turns = [{"role": "user", "content": pair.prompt_text}]
    prompt = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for text, answer in ((chosen, pair.chosen_text), (rejected, pair.rejected_text)):
        assert "".join(MARK.findall(text)) == visible(answer + "<|im_end|>")
        assert MARK.sub("", text).strip() == visible(prompt)


def test_long_rows_show_where_the_response_begins_and_how_it_ends() -> None:
    ids = TOKENIZER(" word" * 200, add_special_tokens=False)["input_ids"]
    pair = Pair("x", ids, [*ids, TOKENIZER.eos_token_id], [5, TOKENIZER.eos_token_id], "", "", "")
    chosen = example(pair, TOKENIZER, "x").plain.split("chosen (both stages)")[1].split("rejected")[0]
    assert chosen.count("…") == 2
    assert len(MARK.findall(chosen)) == SHOWN + 3
    assert MARK.findall(chosen)[-1] == TOKENIZER.eos_token


def test_control_characters_of_a_row_never_reach_the_terminal() -> None:
    assert visible("a\x1b[31m\r\nb\u202e") == "a\\x1b[31m\\r\\nb\\u202e"
    ids = TOKENIZER("red \x1b[31m", add_special_tokens=False)["input_ids"]
    pair = Pair("x\x1b", ids, [*ids, 2], [5, 2], "", "", "")
    assert "\x1b" not in example(pair, TOKENIZER, "x").plain.split("\n", 1)[1]


# -- batches and steps -------------------------------------------------------------------------------------------------


def test_ranks_are_reckoned_with() -> None:
    """Two ranks hold 2 x 4 pairs, the global batch of 8; four a rank come to it without accumulation, two with 2."""
    assert cells(validate("ranks=2").out, "sft") == ["2", "4", "1", "2", "8"]
    assert cells(validate().out, "sft") == ["2", "4", "2", "1", "8"]
    assert "sft.batch_size=8 is not micro_batch_size=4 x 3 ranks" in told(validate("ranks=3"))
    assert "task 'instruct' has 16 training pairs for 17 ranks" in told(
        validate("ranks=17", "sft.batch_size=null", "preference.batch_size=null")
    )


@pytest.mark.parametrize("word", ["ranks=0", "ranks=two", "ranks=", "ranks=-1"])
def test_ranks_that_are_no_number(word: str) -> None:
    assert f"{word}: give a number" in told(validate(word))


@pytest.mark.parametrize("strategy", ["lifealign", "seqft", "mtl", "stl"])
def test_the_steps_and_the_disk_are_those_of_a_run(strategy: str, tmp_path: Path) -> None:
    chosen = f"strategy={strategy}", "preference.epochs=1", "data.max_train=20", "evaluation.metrics=[chosen_nll]"
    run = train_here(tmp_path / "run", *chosen)
    config, tasks = loaded(*chosen)
    work = plan_work(config, tasks, ranks=1)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taken = [(row["task"], row["stage"]) for row in steps if row["kind"] == "step"]
    assert {(w.task, stage): count for w in work for stage, count in w.steps.items()} == {
        place: taken.count(place) for place in taken
    }
    found = estimate(config, tasks, work, ranks=1)
    held = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    seals = read_json(newest_folder(run / "checkpoints") / "manifest.json")["files"]
    copies = sum(seal["bytes"] for file, seal in seals.items() if file.startswith("memory/") and file.endswith(".safetensors"))
    assert bool(copies) == (strategy == "lifealign")
    assert found.disk == pytest.approx(held + copies, rel=0.1)  # headers, and what a checkpoint holds of references
    assert found.base == FLOAT32 * sum(t.numel() for t in load_file(TINY_MODEL / "model.safetensors").values())


def test_work_by_hand() -> None:
    """Two tasks of 2 pairs, prompts of 3, chosen 4, rejected 5; half of the first task's pairs come again in the second.

    Trained: sft once (7 tokens a pair), preference twice (12): 2 x 7 + 2 x 2 x 12 = 62, then with a third pair 93. Read:
    references of 2 pairs, 24; scores of one held-out pair a task, 12, and its answer, 3 + 10: 49, then 24 + 2 x 25 = 74.
    """
    config, _ = loaded("strategy.buffer_fraction=0.5", "sft.epochs=1", "evaluation.max_new_tokens=10")
    pairs = [Pair(str(i), [1] * 3, [2] * 4, [3] * 5, "", "", "") for i in range(3)]
    tasks = [Task(name, name, pairs[:2], pairs[2:], {}, "") for name in ("a", "b")]
    work = plan_work(config, tasks, ranks=1)
    assert [(w.own, w.replayed) for w in work] == [(2, 0), (2, 1)]
    assert [(w.trained_tokens, w.read_tokens) for w in work] == [(62, 49), (93, 74)]


# -- memory and time ---------------------------------------------------------------------------------------------------


def test_estimates_by_hand() -> None:
    """Adapters of rank 8 on q_proj and v_proj: their elements four times over (weight, gradient, two moments).

    ZeRO 3 on two ranks halves the base and all but the weights; a step of one task is 4 operations a trained token and body
    weight, and 2 a token that is only read.
    """
    config, tasks = loaded()
    work = plan_work(config, tasks, ranks=1)
    one = estimate(config, tasks, work, ranks=1)
    shapes = json.loads((TINY_MODEL / "config.json").read_text())
    width = shapes["hidden_size"]
    values = width // shapes["num_attention_heads"] * shapes["num_key_value_heads"]
    factors = shapes["num_hidden_layers"] * 8 * (width + width + width + values)
    assert one.adapter == 4 * factors * FLOAT32
    body = sum(
        t.numel() for n, t in load_file(TINY_MODEL / "model.safetensors").items() if "embed" not in n and "head" not in n
    )
    assert one.operations == body * sum(4 * w.trained_tokens + 2 * w.read_tokens for w in work)
    config.zero.stage = 3
    two = estimate(config, tasks, work, ranks=2)
    assert two.base == one.base // 2
    assert two.adapter == factors * FLOAT32 * 2.5
    assert two.seconds == pytest.approx(two.operations / two.rate / 2)


@pytest.mark.parametrize("architecture", [None, "mistral"])
def test_the_rate_is_that_of_one_layer(architecture: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes a second over two lines of 75 tokens: 2 x 150 x 4 operations a weight of the first layer and the last norm."""
    config, _ = loaded()
    folder = TINY_MODEL
    if architecture is not None:
        folder = random_base(tmp_path, architecture)
        config.model.path = str(folder)

    def twice(work: Callable[[], object]) -> float:
        work()
        return 2.0

    monkeypatch.setattr(estimate_module, "passes_a_second", twice)
    weights = load_file(folder / "model.safetensors").items()
    layer = sum(t.numel() for name, t in weights if ".layers.0." in name or name == "model.norm.weight")
    assert layer_rate(config, 150) == 2 * 150 * 4 * layer
    assert layer_rate(config, 5) == 2 * 5 * 4 * layer


def test_the_rate_is_measured() -> None:
    import torch

    rates = [product_rate(torch.float32) for _ in range(2)]
    assert min(rates) > 1e8  # slower than any machine that could train
    assert max(rates) < 1e15


def test_weights_are_not_needed(tmp_path: Path) -> None:
    model = shutil.copytree(TINY_MODEL, tmp_path / "model")
    (model / "model.safetensors").unlink()
    ended = validate(f"model.path={model}")
    assert (ended.code, ended.err) == (0, "")
    assert "The configuration is valid" in ended.out


# -- what a run would refuse -------------------------------------------------------------------------------------------


def test_a_judge_that_is_not_named_or_has_no_criterion() -> None:
    assert "evaluation.judge: no judge is named" in told(validate("evaluation.metrics=[judge]"))
    named = "evaluation.metrics=[judge]", "evaluation.judge.local=somewhere", "evaluation.judge.rubrics.hc3=nothing"
    assert "evaluation.judge.rubrics.hc3=nothing: unknown criterion" in told(validate(*named))


def test_a_quantised_base_that_cannot_be_had() -> None:
    assert "model.quantization=nf4: " in told(validate("model.quantization=nf4", "zero=3"))


def test_rows_that_are_longer_than_the_base_was_made_for(tmp_path: Path) -> None:
    model = Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
    written = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**written, "max_position_embeddings": 60}))
    line = told(validate(f"model.path={model}"))
    assert "has 60 positions, and the longest row has " in line and "lower data.max_prompt_tokens" in line
    short = f"model.path={model}", "data.max_prompt_tokens=20", "data.max_response_tokens=20", "evaluation.metrics=[rouge_l]"
    assert validate(*short, "evaluation.max_new_tokens=40").code == 0
    pool = "strategy=l2p", "strategy.pool_size=2", "strategy.top_k=2", "strategy.prompt_length=5"
    assert "may have 70" in told(validate(*short, *pool, "evaluation.max_new_tokens=40"))
    line = told(validate(*short, "evaluation.max_new_tokens=41"))
    assert "may have 61; lower data.max_prompt_tokens or evaluation.max_new_tokens" in line


def test_an_option_may_stand_last(tmp_path: Path) -> None:
    assert validate("--config-dir", str(tmp_path)).code == 0


def test_a_sweep_is_gone_through_and_one_that_was_trained_there_keeps_its_notes(tmp_path: Path) -> None:
    note = tmp_path / "sweep" / "jobs" / "0.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    ended = validate("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ended.code == 0 and ended.out.count("The configuration is valid; nothing was trained.") == 2
    assert [path.name for path in note.parent.iterdir()] == ["0.json"] and note.read_text() == "{}"
