"""What a user gets wrong is told in one line that names the place and the fix, with exit code 2 and no traceback."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import QUICK, REPOSITORY, Ended, command, end_here, environment, launch, train_here

import lifealign.trainer
from lifealign.assets import SIX_DOMAINS, TINY_MODEL
from lifealign.command import hydra_command
from lifealign.errors import DIVERGED, TrainingDiverged
from lifealign.lifelong import Lifelong
from lifealign.models.adapter import read_factors
from lifealign.objectives import FPO
from lifealign.objectives.preference import PreferenceLoss
from lifealign.run import train
from lifealign.stages import Outcome, SupervisedStage
from lifealign.validate import validate

SEQUENCE = "+sequence=six_domains"


def told(ended: Ended) -> str:
    """The one line on standard error of a command that ended with exit code 2."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err + ended.out
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def mistake(*arguments: str) -> str:
    """What ``train.py`` says about these arguments; nothing may come of them."""
    ended = end_here(lambda: hydra_command(train), *arguments)
    assert "Scores over" not in ended.out, "it was taken for no mistake"
    return told(ended)


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mistaken run may leave, it leaves in a folder of the test."""
    monkeypatch.chdir(tmp_path)


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "named", "fix"),
    [
        ("sft.lrr=1", "sft.lrr", "sft.lr"),
        ("+sft.lrr=1", "sft.lrr", "sft.lr"),
        ("model.lora.rank=4", "model.lora.rank", "model.lora.r"),
        ("+model.lora.rank=4", "model.lora.rank", "model.lora.r"),
        ("data.max_trian=4", "data.max_trian", "data.max_train"),
        ("objective.gama=1", "objective.gama", "objective.gamma"),
        ("+objective.gama=1", "objective.gama", "objective.gamma"),
        ("strategy.denoise_enrgy=0.5", "strategy.denoise_enrgy", "strategy.denoise_energy"),
        ("+strategy.denoise_enrgy=0.5", "strategy.denoise_enrgy", "strategy.denoise_energy"),
        ("stratgy=er", "stratgy", "strategy"),
        ("+stratgy=er", "stratgy", "strategy"),
        ("+sequnce=six_domains", "sequnce", "sequence"),
        ("sequence.task=[instruct]", "sequence.task", "sequence.tasks"),
        ("+trackng.mode=disabled", "trackng", "tracking"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_that_exists(override: str, named: str, fix: str) -> None:
    line = mistake(SEQUENCE, override)
    assert f"'{named}'" in line or f"'{named}." in line
    assert f"did you mean '{fix}" in line


@pytest.mark.parametrize(
    ("preset", "content", "named", "fix"),
    [
        ("model/mine", "path: x\ndtyp: float32\n", "model.dtyp", "model.dtype"),
        ("experiment/mine", "# @package _global_\nsft:\n  lrr: 1.0\n", "sft.lrr", "sft.lr"),
    ],
)
def test_a_misspelt_key_of_a_preset_is_named_with_its_file(
    preset: str, content: str, named: str, fix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"{preset}.yaml"
    file.parent.mkdir()
    file.write_text(content)
    said = mistake(f"--config-dir={tmp_path}", SEQUENCE, preset.replace("/", "="))
    assert said == f"'{named}' is no key of the configuration; did you mean '{fix}'? (in {preset}.yaml)"


def test_a_misspelt_sequence_alone() -> None:
    assert mistake("+sequnce=six_domains") == "'sequnce' is no key of the configuration; did you mean 'sequence'?"


@pytest.mark.parametrize(
    ("component", "override"), [("objective=dpo", "objective.gamma=2"), ("strategy=seqft", "strategy.buffer_size=2")]
)
def test_an_option_of_another_component(component: str, override: str) -> None:
    assert override.split("=")[0] in mistake(SEQUENCE, component, override)


@pytest.mark.parametrize("overrides", [(), ("seed=1",), ("sequence.tasks=[instruct]",)])
def test_a_missing_sequence_is_asked_for_with_the_names_of_those_there_are(overrides: tuple[str, ...]) -> None:
    line = mistake(*overrides)
    assert "+sequence=" in line
    assert "six_domains_reversed" in line


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("strategy=erx", "er"),
        ("objective=fpoo", "fpo"),
        ("zero=7", "0, 1, 2, 3"),
        ("model=tinny", "tiny"),
        ("data=hubb", "hub"),
        ("experiment=papr_qwen2_5_7b", "paper_qwen2_5_7b"),
    ],
)
def test_an_unknown_preset_is_named_with_the_nearest(override: str, fix: str) -> None:
    line = mistake(SEQUENCE, override)
    assert line.startswith(f"{override}: ")
    assert line.removesuffix("?").removesuffix("'").endswith(fix)


@pytest.mark.parametrize("argument", ["+sequence=six_domain", "sequence=six_domain"])
def test_an_unknown_sequence(argument: str) -> None:
    assert mistake(argument) == "sequence=six_domain: there is no such preset; did you mean 'six_domains'?"


@pytest.mark.parametrize("argument", ["sft.lr", "--micro_batch_size=4"])
def test_what_is_no_override_at_all(argument: str) -> None:
    assert argument.split("=")[0] in mistake(SEQUENCE, argument)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "seed=abc",
        "sft.epochs=one",
        "sft.epochs=1.5",
        "sft.lr=fast",
        "sft.lr=null",
        "sft=3",
        "model.dtype=float8",
        "model.row_layout=square",
        "model.lora.target_modules=q_proj",
        "zero.stage=x",
        "evaluation.forward=perhaps",
        "tracking.mode=maybe",
        "resume=sometimes",
        "sequence.tasks=instruct",
        "data.max_train=many",
        "strategy.denoise_energy=most",
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_its_key(override: str) -> None:
    assert mistake(SEQUENCE, override).startswith(f"{override.split('=')[0]}: ")


@pytest.mark.parametrize(
    "override",
    [
        "objective.beta=0",
        "objective.beta=nan",
        "objective.gamma=-1",
        "objective.confidence_threshold=0",
        "objective.confidence_threshold=1.1",
        "strategy.denoise_energy=-0.1",
        "strategy.denoise_energy=2",
        "strategy.projection_scale=-1",
        "strategy.buffer_fraction=2",
        "strategy.buffer_size=-1",
        "strategy.consolidate_stages=[dpo]",
        "sft.epochs=-1",
        "sft.lr=-1",
        "sft.lr=nan",
        "sft.micro_batch_size=0",
        "preference.warmup_share=2",
        "model.lora.r=0",
        "model.lora.dropout=1",
        "zero.stage=4",
        "data.max_train=0",
        "data.max_prompt_tokens=0",
        "data.max_response_tokens=1",
        "evaluation.max_new_tokens=0",
        "evaluation.batch_size=0",
        "evaluation.max_generations=-3",
        "checkpoint.keep=0",
        "tracking.log_every=0",
        # a component is chosen by its group; under another's name its scores would lie
        "objective.name=dpo",
        "strategy.name=er",
    ],
)
def test_a_value_out_of_range_is_told_with_its_key(override: str) -> None:
    assert override.split("=")[0] in mistake(*QUICK, "data.max_train=8", override)


def test_nothing_to_train() -> None:
    assert "sft.epochs=0 and preference.epochs=0" in mistake(SEQUENCE, "sft.epochs=0", "preference.epochs=0")


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_batch_sizes_that_do_not_divide(stage: str) -> None:
    line = mistake(SEQUENCE, f"{stage}.batch_size=10", f"{stage}.micro_batch_size=4")
    assert f"{stage}.batch_size=10" in line
    assert "batch_size of 8" in line
    both = f"{stage}.batch_size=8", f"{stage}.micro_batch_size=4", f"{stage}.gradient_accumulation_steps=3"
    assert "batch_size of 12" in mistake(SEQUENCE, *both)


def test_more_ranks_than_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """``validate`` only asks how many ranks there are; a real launch of two is further below."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    line = told(end_here(lambda: hydra_command(validate), SEQUENCE, "data.max_train=3"))
    assert line == "task 'instruct' has 3 training pairs for 4 ranks; use fewer ranks or more data"


def test_an_unknown_metric() -> None:
    assert "did you mean 'rouge_l'?" in mistake(SEQUENCE, "evaluation.metrics=[rouge]")
    assert "preference_accuracy" in mistake(SEQUENCE, "evaluation.metrics=[preference_acuracy]")


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with one task whose rows are in order."""
    task = tmp_path / "rows" / "instruct"
    task.mkdir(parents=True)
    lines = [json.loads(line) for line in (SIX_DOMAINS / "instruct" / "train.jsonl").read_text().splitlines()[:8]]
    for split in ("train", "test"):
        (task / f"{split}.json").write_text(json.dumps(lines))
    return task


def change(task: Path, row: int, **columns: object) -> None:
    lines = json.loads((task / "train.json").read_text())
    lines[row] |= columns
    lines[row] = {name: value for name, value in lines[row].items() if value is not None}
    (task / "train.json").write_text(json.dumps(lines))


def mistake_in(task: Path, *overrides: str) -> str:
    return mistake(SEQUENCE, "sequence.tasks=[instruct]", f"data.root={task.parent}", *overrides)


def test_an_unknown_task() -> None:
    assert mistake(SEQUENCE, "sequence.tasks=[instruct,hc4]") == "sequence.tasks: unknown task 'hc4'; did you mean 'hc3'?"


def test_a_task_with_a_name_that_no_folder_could_hold_with_what_is_added_to_it() -> None:
    assert "has 181 characters; at most 180" in mistake("+sequence=six_domains", f"sequence.tasks=[{'x' * 181}]")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert f"data.root: no folder '{tmp_path / 'rowz'}'" in mistake(SEQUENCE, f"data.root={tmp_path / 'rowz'}")


def test_a_task_without_a_folder_or_without_a_file(rows: Path) -> None:
    line = mistake(SEQUENCE, "sequence.tasks=[instruct,hc3]", f"data.root={rows.parent}")
    assert str(rows.parent / "hc3") in line
    (rows / "test.json").unlink()
    line = mistake_in(rows)
    assert str(rows) in line
    assert "test.json" in line


def test_a_file_that_is_not_json(rows: Path) -> None:
    (rows / "train.json").write_text('[{"query": "x",\n "chosen": oops}]')
    assert f"{rows / 'train.json'}, line 2: not JSON" in mistake_in(rows)


def test_a_row_without_chosen(rows: Path) -> None:
    change(rows, 5, chosen=None, chosn="yes")  # counted from 0 here, from 1 in the message
    line = mistake_in(rows)
    assert str(rows / "train.json") in line
    assert "row 6" in line
    assert "column 'chosen' is missing; did you mean 'chosn'?" in line


def test_a_row_with_an_empty_response(rows: Path) -> None:
    change(rows, 3, rejected="  ")
    line = mistake_in(rows)
    assert str(rows / "train.json") in line
    assert "row 4" in line
    assert "empty response" in line
    assert "data.max_empty=" in line


def test_equal_responses_are_dropped_and_counted_and_fatal_only_where_nothing_is_left(rows: Path) -> None:
    change(rows, 2, chosen="the same", rejected="the same")
    ended = end_here(lambda: hydra_command(validate), SEQUENCE, "sequence.tasks=[instruct]", f"data.root={rows.parent}")
    assert ended.code == 0
    # Training and held-out rows are the same here, so that every prompt that is left in training is seen.
    assert [word for word in ended.out.split("instruct")[1].split() if word.isdigit()][:4] == ["7", "8", "7", "1"]
    for row in range(8):
        change(rows, row, chosen="the same", rejected="the same")
    assert "none of its 8 rows can be used" in mistake_in(rows)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(TINY_MODEL, tmp_path / "model")


def mistake_with(model: Path | str) -> str:
    return mistake(SEQUENCE, "sequence.tasks=[instruct]", "data.max_train=8", "model=custom", f"model.path={model}")


def test_a_model_that_is_not_named() -> None:
    assert "model.path" in mistake(SEQUENCE, "model=custom")


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    assert f"model.path={tmp_path / 'none'}: " in mistake_with(tmp_path / "none")


@pytest.mark.parametrize("files", [["*token*", "*.jinja"], ["*token*"]])
def test_a_model_without_a_tokenizer(files: list[str], model: Path) -> None:
    """With the second, the chat template is still there, in a file of its own; transformers then makes an empty tokenizer."""
    for file in (found for pattern in files for found in model.glob(pattern)):
        file.unlink()
    line = mistake_with(model)
    assert line.startswith(f"model.path={model}: ")
    assert "tokenizer" in line


def test_a_tokenizer_without_a_chat_template(model: Path) -> None:
    for file in model.glob("*.jinja"):
        file.unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert f"model.path={model}: its tokenizer has no chat template" in mistake_with(model)


def test_a_folder_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    line = mistake_with(model)
    assert line.startswith(f"model.path={model}: ")
    assert "model.safetensors" in line


@pytest.mark.parametrize(
    ("targets", "named"),
    [("[q_proj,v_prj]", "'v_prj' matches no linear layer; did you mean 'v_proj'?"), ("[lm_head]", "'lm_head'"), ("[]", "")],
)
def test_lora_targets_that_match_nothing(targets: str, named: str) -> None:
    line = mistake(*QUICK, f"model.lora.target_modules={targets}")
    assert line.startswith("model.lora.target_modules")
    assert named in line


# -- other commands ----------------------------------------------------------------------------------------------------


def launcher(name: str) -> Callable[[], object]:
    return lambda: runpy.run_path(str(REPOSITORY / "launch" / f"{name}.py"), run_name="__main__")


def test_evaluate_without_a_run() -> None:
    assert "run=RUN_DIR" in told(end_here(launcher("evaluate")))


def test_evaluate_with_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "none"):
        assert str(run) in told(end_here(launcher("evaluate"), f"run={run}"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = "data.max_train=8", "data.max_eval=4", "sequence.tasks=[instruct]"
    return train_here(tmp_path_factory.mktemp("trained") / "run", *small, "evaluation.metrics=[chosen_nll]")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluation.metrcs=[chosen_nll]", "evaluation.metrics"),
        ("evaluation.metrics=[rouge]", "rouge_l"),
        ("evaluation.batch_size=many", "evaluation.batch_size"),
    ],
)
def test_evaluate_with_a_mistaken_override(override: str, named: str, run: Path) -> None:
    assert named in told(end_here(launcher("evaluate"), f"run={run}", override))
    assert not (run / "rescored").exists()


def test_export(run: Path, tmp_path: Path) -> None:
    assert "--to" in told(end_here(launcher("export"), str(run), "--to", str(tmp_path)))
    assert str(tmp_path) in told(end_here(launcher("export"), str(tmp_path), "--to", str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_export_to_nowhere(run: Path) -> None:
    assert "--to" in told(end_here(launcher("export"), str(run)))


def test_a_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = mistake(*QUICK, f"run.dir={tmp_path / 'file'}")
    assert "run.dir" in line


# -- as a user sees it -------------------------------------------------------------------------------------------------


def test_a_real_command(tmp_path: Path) -> None:
    words = sys.executable, str(REPOSITORY / "launch" / "train.py"), "+sequnce=six_domains"
    ended = command(*words, cwd=tmp_path)
    line = "error: 'sequnce' is no key of the configuration; did you mean 'sequence'?\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_tell_it_once(tmp_path: Path) -> None:
    ended = launch(["deepspeed", "--num_gpus", "2"], "data.max_train=1", cwd=tmp_path)
    assert ended.returncode == 2
    everything = ended.stdout + ended.stderr
    assert everything.count("error: ") == 1
    assert "error: task 'instruct' has 1 training pairs for 2 ranks; use fewer ranks or more data" in everything
    assert "Traceback" not in everything


# -- a loss that is no number ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "bad"), [("preference", float("nan")), ("sft", float("inf"))])
def test_a_loss_that_is_no_number_stops_before_the_step(
    stage: str, bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second step of the stage: the adapter is still that of the first, and no checkpoint holds the stage."""
    lifelong: list[Lifelong] = []
    steps: list[str] = []
    at_second: dict[str, torch.Tensor] = {}
    init, take_step, usual, outcome = Lifelong.__init__, lifealign.trainer.step, FPO.__call__, SupervisedStage.outcome

    def spoil(value: torch.Tensor) -> torch.Tensor:
        if steps.count(stage) < 2:  # each step has two micro-batches
            return value
        at_second.update(read_factors(lifelong[0].policy.model))
        return value + bad

    def remember(self: Lifelong, *arguments: object) -> None:
        init(self, *arguments)
        lifelong.append(self)

    def count_steps(engine: object) -> float | None:
        steps.append(lifelong[0].position.phase)
        return take_step(engine)

    def spoilt_call(self: FPO, *arguments: torch.Tensor) -> PreferenceLoss:
        result = usual(self, *arguments)
        return result._replace(losses=spoil(result.losses)) if stage == "preference" else result

    def spoilt_outcome(self: SupervisedStage, *arguments: object) -> Outcome:
        result = outcome(self, *arguments)
        return result._replace(losses=spoil(result.losses)) if stage == "sft" else result

    monkeypatch.setattr(Lifelong, "__init__", remember)
    monkeypatch.setattr(lifealign.trainer, "step", count_steps)
    monkeypatch.setattr(FPO, "__call__", spoilt_call)
    monkeypatch.setattr(SupervisedStage, "outcome", spoilt_outcome)
    with pytest.raises(TrainingDiverged, match=rf"loss is {bad} at step 2 of the {stage} stage of task instruct"):
        train_here(tmp_path / "run", "strategy=seqft")

    now = read_factors(lifelong[0].policy.model)
    assert now.keys() == at_second.keys()
    assert all(now[name].equal(at_second[name]) for name in now)
    assert steps.count(stage) == 3  # two micro-batches of the first step, and the first of the second is only counted
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*")]
    assert kept == (["00001"] if stage == "preference" else [])
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage_step"] for row in logged if row.get("stage") == stage] == [1]


def test_divergence_as_a_command_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = FPO.__call__
    monkeypatch.setattr(FPO, "__call__", lambda *a: (r := usual(*a))._replace(losses=r.losses * float("nan")))
    small = "data.max_train=8", "data.max_eval=4", "sequence.tasks=[instruct]", "sft.epochs=0"
    ended = end_here(lambda: hydra_command(train), *QUICK, *small, f"run.dir={tmp_path / 'run'}")
    assert ended.code == DIVERGED == 3
    (line,) = ended.err.splitlines()
    assert line.startswith("error: loss is nan at step 1 of the preference stage of task instruct")


# -- terminals ---------------------------------------------------------------------------------------------------------


def test_a_terminal_without_a_sign_gets_another_and_no_error() -> None:
    """Latin-1 has no sigma, which stands in the closing table of every run."""
    code = "from lifealign.environment import prepare_process; prepare_process(); print('log \\N{GREEK SMALL LETTER SIGMA}(r)')"
    words = [sys.executable, "-c", code]
    ended = subprocess.run(words, env={**environment(), "PYTHONIOENCODING": "latin-1"}, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"log ?(r)\n", b"")
