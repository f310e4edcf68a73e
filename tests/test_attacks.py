"""Files and values that would have code run: refused in one line, and nothing of it happens.

Every payload would make a file ``pwned``; no test looks at a message alone.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers.dynamic_module_utils
from support import QUICK, REPOSITORY, Ended, end_here, train_here

from lifealign import memory_command
from lifealign.assets import TINY_MODEL
from lifealign.command import hydra_command
from lifealign.errors import UserError
from lifealign.evaluation.judge.answers import Item, judge_answers
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.models.loading import load_base, load_tokenizer
from lifealign.models.options import ModelOptions
from lifealign.run import train
from lifealign.runtime.checkpoint import MANIFEST, OWN, TENSORS, _manifest, newest_folder
from lifealign.runtime.engine import ZeroOptions, deepspeed_config
from lifealign.runtime.files import file_seal, json_text


@pytest.fixture(autouse=True)
def pwned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a payload would make. Commands run in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pwned"


def refused(ended: Ended, *named: str) -> str:
    """The one line of a command that ended with exit code 2."""
    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and "Scores over" not in ended.out
    assert all(name in line for name in named), line
    return line


def training(*arguments: str) -> Ended:
    return end_here(lambda: hydra_command(train), *QUICK, *arguments)


def launcher(name: str) -> Callable[[], object]:
    return lambda: runpy.run_path(str(REPOSITORY / "launch" / f"{name}.py"), run_name="__main__")


# -- configuration -----------------------------------------------------------------------------------------------------


def preset(folder: Path, text: str) -> tuple[str, str]:
    """Arguments that take the sequence ``evil`` from a folder of the user's."""
    path = folder / "conf" / "sequence" / "evil.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return f"--config-dir={folder / 'conf'}", "+sequence=evil"


YAML_TAGS = [
    '!!python/object/apply:pathlib.Path.touch ["{pwned}"]',
    '!!python/object/new:os.mkdir ["{pwned}"]',
    "!!python/name:os.system",
    "!!python/module:antigravity",
]


@pytest.mark.parametrize("tag", YAML_TAGS)
def test_yaml_tags_of_a_sequence(tag: str, tmp_path: Path, pwned: Path) -> None:
    words = preset(tmp_path, f"name: evil\ntasks: {tag.format(pwned=pwned)}\n")
    refused(end_here(lambda: hydra_command(train), *words), "evil.yaml, line 2", "python/")
    assert not pwned.exists()


HYDRA_SECTIONS = {
    "callbacks": "callbacks: {x: {_target_: shutil.copyfile, src: conf/sequence/evil.yaml, dst: pwned}}",
    "handler": "job_logging: {handlers: {file: {(): shutil.copyfile, src: conf/sequence/evil.yaml, dst: pwned}}}",
    "class": "job_logging: {handlers: {file: {class: pathlib.Path, filename: pwned}}}",
    "launcher": "launcher: {_target_: shutil.copyfile}",
    "disguised": "callbacks: {x: {_target_: lifealign.sweep.shutil.copyfile, src: conf/sequence/evil.yaml, dst: pwned}}",
    "elsewhere": "job_logging: {handlers: {file: '${evil}'}}",
    "stream": "hydra_logging: {handlers: {console: {stream: 'ext://os.sep'}}}",
}


@pytest.mark.parametrize("section", HYDRA_SECTIONS.values(), ids=HYDRA_SECTIONS.keys())
def test_a_preset_cannot_have_hydra_call_anything(section: str, tmp_path: Path, pwned: Path) -> None:
    text = f"# @package _global_\nsequence: {{name: evil, tasks: [instruct]}}\nhydra:\n  {section}\n"
    words = preset(tmp_path, text)
    refused(end_here(lambda: hydra_command(train), *words), "hydra.")
    assert not pwned.exists()


@pytest.mark.parametrize(
    "override",
    [
        "+_target_=os.mkdir",
        "+objective._target_=os.mkdir",
        "+strategy._target_=os.mkdir",
        "+zero.settings._target_=os.mkdir",
        "+evaluation.judge.rubrics._target_=os.mkdir",
        "+zero.settings.deep={list:[{_target_:os.mkdir,_args_:[pwned]}]}",
        "+hydra.callbacks.x={_target_:os.mkdir,path:pwned}",
        "hydra.sweeper._target_=os.mkdir",
    ],
)
def test_a_target_in_an_override(override: str, pwned: Path) -> None:
    refused(training(override), "_target_")
    assert not pwned.exists()


def test_presets_from_a_package_are_not_looked_for(tmp_path: Path, pwned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "evil_package"
    package.mkdir()
    (package / "__init__.py").write_text(f"import pathlib; pathlib.Path({str(pwned)!r}).touch()")
    monkeypatch.syspath_prepend(tmp_path)
    refused(training("hydra.searchpath=[pkg://evil_package]"), "--config-dir")
    assert not pwned.exists()


@pytest.mark.parametrize("tag", YAML_TAGS[:2])
def test_yaml_tags_of_a_run_that_is_gone_on_with(tag: str, tmp_path: Path, pwned: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints" / "00001").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: {tag.format(pwned=pwned)}\n")
    refused(training(f"run.dir={folder}"), str(folder / "config.yaml"), "python/")
    assert not pwned.exists()


# -- pickles in a run directory ----------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def pickled(pwned: Path, *, by_torch: bool) -> bytes:
    """A pickle that calls what it should not, as plain ``pickle`` or ``torch.save`` writes it."""
    content = BytesIO()
    torch.save({"weight": Payload(pwned)}, content) if by_torch else pickle.dump(Payload(pwned), content)
    return content.getvalue()


def test_the_payloads_work(tmp_path: Path, pwned: Path) -> None:
    """Or the tests below could not fail."""
    pickle.loads(pickled(pwned, by_torch=False))
    assert pwned.exists()
    pwned.unlink()
    torch.load(BytesIO(pickled(pwned, by_torch=True)), weights_only=False)
    assert pwned.exists()


SMALL = "sequence.tasks=[instruct]", "data.max_train=8", "data.max_eval=4", "evaluation.metrics=[chosen_nll]", "sft.epochs=0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one task, with two checkpoints."""
    return train_here(tmp_path_factory.mktemp("finished") / "run", *SMALL)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def plant(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


BESIDE = [
    "checkpoints/{newest}/optimizer.pt",
    "checkpoints/{newest}/rng_state_0.pth",
    "checkpoints/99999/mp_rank_00_model_states.pt",
    "adapter/adapter_model.bin",
    "tasks/01_instruct/adapter/adapter_model.bin",
    "memory/000_instruct_preference/shard-0.pt",
    "memory/ledger.pkl",
]


@pytest.mark.parametrize("by_torch", [False, True])
def test_pickles_that_lie_beside_are_never_opened(by_torch: bool, run: Path, tmp_path: Path, pwned: Path) -> None:
    """The run goes on, is scored, exported and edited; what is handed on has no pickle in it."""
    newest = newest_folder(run / "checkpoints")
    assert newest is not None
    for place in BESIDE:
        plant(run / place.format(newest=newest.name), pickled(pwned, by_torch=by_torch))
    ended = training(*SMALL, f"run.dir={run}")
    assert ended.code == 0, ended.err
    assert end_here(launcher("evaluate"), f"run={run}").code == 0
    assert end_here(launcher("export"), str(run), "--to", str(tmp_path / "out")).code == 0
    assert memory_command.main([str(run), "revert", "instruct", "--to", str(tmp_path / "edited")]) == 0
    assert {path.suffix for path in [*(tmp_path / "out").iterdir(), *(tmp_path / "edited").iterdir()]}.isdisjoint(
        {".bin", ".pt"}
    )
    assert not pwned.exists()


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_pickle_in_the_place_of_tensors(by_torch: bool, run: Path, tmp_path: Path, pwned: Path) -> None:
    """Sealed by whoever put it there, in the newest checkpoint, the adapter and the long-term memory."""
    content = pickled(pwned, by_torch=by_torch)
    for checkpoint in [manifest.parent for manifest in (run / "checkpoints").glob(f"*/{MANIFEST}")]:
        plant(checkpoint / TENSORS, content)
        seals = {**json.loads((checkpoint / MANIFEST).read_bytes())["files"], **{f: file_seal(checkpoint / f) for f in OWN}}
        plant(checkpoint / MANIFEST, json_text(_manifest(seals)).encode())
    plant(run / "tasks/01_instruct/adapter/adapter_model.safetensors", content)
    plant(run / "memory/000_instruct_preference/shard-0.safetensors", content)
    ended = training(*SMALL, f"run.dir={run}")
    refused(ended, "no checkpoint is as it was written", "tensors.safetensors holds no tensors")
    refused(end_here(launcher("evaluate"), f"run={run}"), "adapter_model.safetensors: cannot be read as safetensors")
    refused(end_here(launcher("export"), str(run), "--to", str(tmp_path / "out")), "cannot be read as safetensors")
    assert memory_command.main([str(run), "revert", "instruct", "--to", str(tmp_path / "edited")]) == 2
    assert not pwned.exists()
    assert not (tmp_path / "out").exists() and not (tmp_path / "edited").exists()


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))


def change(path: Path, **values: object) -> None:
    """Keys of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def say_yes(model: Path) -> Ended:
    """A training on it, by somebody who would answer every question with yes."""
    with mock.patch("builtins.input", return_value="y"):
        return training("model=custom", f"model.path={model}")


OF_THE_MODEL = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_not_run(file: str, model: Path, pwned: Path) -> None:
    (model / "evil.py").write_text(f"import pathlib; pathlib.Path({str(pwned)!r}).touch()")
    if file == "config.json":
        change(model / file, model_type="evil", auto_map=OF_THE_MODEL)
    else:
        change(model / file, tokenizer_class="Tokenizer", auto_map=OF_THE_MODEL)
        change(model / "config.json", model_type="evil")
    refused(say_yes(model), "model.trust_remote_code=true")
    assert not pwned.exists()


@pytest.mark.parametrize("kind", ["code", "pickle"])
def test_nothing_of_a_judge_is_run(kind: str, model: Path, pwned: Path, tmp_path: Path) -> None:
    if kind == "code":
        (model / "evil.py").write_text(f"import pathlib; pathlib.Path({str(pwned)!r}).touch()")
        change(model / "config.json", model_type="evil", auto_map=OF_THE_MODEL)
        change(model / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=OF_THE_MODEL)
    else:
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickled(pwned, by_torch=True))
    options = JudgeOptions(local=str(model))
    with mock.patch("builtins.input", return_value="y"), pytest.raises(UserError, match=r"evaluation\.judge\.local="):
        judge_answers(options, [Item("q", "a")], task="instruct", folder=tmp_path / "judge")
    assert not pwned.exists()


def test_code_of_a_model_is_run_where_that_is_asked_for_and_a_line_says_so(
    model: Path, pwned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"import pathlib; pathlib.Path({str(pwned)!r}).touch()\n"
    code += "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
    code += "class Config(Qwen2Config):\n    model_type = 'evil'\n\nclass Model(Qwen2ForCausalLM):\n    config_class = Config\n"
    (model / "evil.py").write_text(code)
    change(model / "config.json", model_type="evil", auto_map={k: v for k, v in OF_THE_MODEL.items() if "Tok" not in k})
    options = ModelOptions(path=str(model), trust_remote_code=True)
    assert type(load_base(options, deepspeed_config(ZeroOptions()))).__name__ == "Model"
    assert pwned.exists()
    assert "model.trust_remote_code=true: code that comes with" in capsys.readouterr().out


def test_weights_that_are_pickled_are_not_read(model: Path, pwned: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickled(pwned, by_torch=True))
    refused(say_yes(model), "weights are read from safetensors alone")
    assert not pwned.exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers=1000000000; no model has that"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000; no model has that"),
        ({"hidden_size": 1 << 20}, "other shapes"),
        ({"head_dim": 10**9}, "other shapes"),
        ({"num_hidden_layers": 6, "layer_types": None}, "lack the weights model.layers.5.input_layernorm.weight and 11 more"),
        ({"num_attention_heads": 0}, "could be loaded"),
        ({"hidden_act": "os.system"}, "could be loaded"),
        ({"_attn_implementation": "evil/kernels:attention"}, "asks for attention from evil/kernels:attention"),
        ({"model_type": 5}, "could be loaded"),
    ],
)
def test_a_hostile_configuration_of_a_model(values: dict[str, object], named: str, model: Path) -> None:
    change(model / "config.json", **values)
    options = ModelOptions(path=str(model))
    with pytest.raises(UserError, match=re.escape(named)):
        load_tokenizer(options)
        load_base(options, deepspeed_config(ZeroOptions()))


# -- dependencies ------------------------------------------------------------------------------------------------------


def test_an_audit_that_nobody_answers_says_so() -> None:
    nowhere = {**os.environ, "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "no_proxy": ""}
    words = sys.executable, str(REPOSITORY / ".ci" / "audit.py")
    ended = subprocess.run(words, env=nowhere, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout.startswith("audit skipped: ")  # pip-audit, or its database, cannot be had
