"""``launch/pretrain.py``: what a base reads and what it never reads, the loss, the same bits twice, the cache, mistakes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPOSITORY, Ended, end_here
from transformers import Qwen2ForCausalLM

from lifealign.command import exit_codes
from lifealign.errors import TrainingDiverged, UserError
from lifealign.models.loading import load_base, load_tokenizer
from lifealign.models.options import ModelOptions
from lifealign.pretrain.corpus import Corpus, fingerprint, pack, read_corpus
from lifealign.pretrain.loop import _step, evaluate, split, train
from lifealign.pretrain.make import RECORD, WEIGHTS, make_base
from lifealign.pretrain.model import new_network, new_tokenizer
from lifealign.pretrain.options import PRESETS, PretrainOptions
from lifealign.runtime.files import read_json

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "block": 32, "batch": 4}
TINY = PretrainOptions(**SIZES, micro_batch=4, epochs=2, lr=0.01, skip_train=2)


def row(prompt: str, chosen: str, rejected: str = "no") -> dict[str, str]:
    return {"query": prompt, "chosen": chosen, "rejected": rejected}


TASKS: dict[str, dict[str, list[dict[str, str]]]] = {
    "first": {
        "train": [
            row("alpha", "one"),
            row("bad row", "same", "same"),  # chosen equals rejected: not usable, so not counted among the first two
            row("beta", "two"),
            row("gamma", "three"),
            row("delta", "four", "five"),
            row("beta", "six"),  # the prompt of a row that the task trains on
            row("kappa", "seven"),  # the prompt of a held-out row of the other task
        ],
        "dev": [row("omega", "eight")],
    },
    "second": {
        "train": [
            row("Human: lambda\nAssistant: mu\nHuman: nu", "Assistant: nine", "Assistant: no"),
            row("pi", "Assistant: ten", "Assistant: no"),
            row("Human: rho\nAssistant: sigma\nHuman: tau", "Assistant: eleven", "Assistant: no"),
            row("Human: lambda\nAssistant: else\nHuman: phi", "Assistant: twelve", "Assistant: no"),  # opens like a skipped one
        ],
        "test": [row("kappa", "thirteen")],
    },
}
INSTRUCTIONS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "omega", "input": "", "output": "a held-out prompt of the first task"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for task, splits in TASKS.items():
        for name, rows in splits.items():
            path = tmp_path / "rows" / task / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "rows"


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    contents = {
        "lines.txt": "The cat sat on the mat.\n\nThe dog sat on the log.\n" + "So it goes on and on.\n" * 40,
        "rows.jsonl": '{"text": " A row. "}\n{"text": ""}\n',
        "asked.json": json.dumps(INSTRUCTIONS),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return [tmp_path / name for name in contents]


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


# -- what is read ------------------------------------------------------------------------------------------------------


def test_tasks_give_the_chosen_side_of_later_training_rows_alone(root: Path) -> None:
    """first: usable rows 3 to 6 (0-based 2 to 5) are gamma, delta, beta again and kappa; the last two open like rows that
    are trained or scored on. second: rho and lambda; lambda opens like the first row, though it goes on otherwise."""
    corpus = read_corpus([], root, skip_train=2)
    assert corpus.chats == {
        "first": [chat("gamma", "three"), chat("delta", "four")],
        "second": [chat("rho", "sigma", "tau", "eleven")],
    }
    assert corpus.left_out == {"first": 2, "second": 1}


def test_a_task_without_rows_to_spare_gives_none(root: Path) -> None:
    assert read_corpus([], root, skip_train=100).chats == {"first": [], "second": []}


def test_text_files_give_lines_rows_and_instructions(root: Path, texts: list[Path]) -> None:
    alone = read_corpus(texts, None, skip_train=0)
    assert alone.texts["lines.txt"][:2] == ["The cat sat on the mat.", "The dog sat on the log."]
    assert alone.texts["rows.jsonl"] == ["A row."]
    assert alone.chats == {"asked.json": [chat("Add.\n1 2", "3"), chat("omega", INSTRUCTIONS[1]["output"])]}
    beside_tasks = read_corpus(texts, root, skip_train=0)
    assert beside_tasks.chats["asked.json"] == [chat("Add.\n1 2", "3")]


def test_rows_of_training_hold_every_document_once_closed_by_the_padding_token(root: Path, texts: list[Path]) -> None:
    """Joined again, rows are the documents in some order; blocks of one token lose nothing."""
    corpus = read_corpus(texts, root, skip_train=2)
    tokenizer = new_tokenizer(corpus.words(), TINY)
    packed = pack(corpus, tokenizer, 1, torch.Generator().manual_seed(0))
    written = [
        "<|im_start|>user\ngamma<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>\n",
        "<|im_start|>user\ndelta<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n",
        "<|im_start|>user\nrho<|im_end|>\n<|im_start|>assistant\nsigma<|im_end|>\n"
        "<|im_start|>user\ntau<|im_end|>\n<|im_start|>assistant\neleven<|im_end|>\n",
        "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n",
        "The cat sat on the mat.",
        "The dog sat on the log.",
        "A row.",
        *["So it goes on and on."] * 40,
    ]
    *found, rest = tokenizer.decode(packed.flatten()).split("<|endoftext|>")
    assert (sorted(found), rest) == (sorted(written), "")
    assert found != written
    longer = pack(corpus, tokenizer, 7, torch.Generator().manual_seed(0))
    assert longer.flatten().tolist() == packed.flatten().tolist()[: len(packed) // 7 * 7]


def test_one_row_in_a_hundred_is_held_out() -> None:
    training, validation = split(torch.arange(600).view(300, 2), torch.Generator().manual_seed(0))
    assert (len(training), len(validation)) == (297, 3)
    assert sorted(torch.cat([training, validation])[:, 0].tolist()) == list(range(0, 600, 2))
    assert len(split(torch.zeros(2, 2), torch.Generator())[1]) == 1


# -- the loss and the loop ---------------------------------------------------------------------------------------------


def network(options: PretrainOptions = TINY) -> Qwen2ForCausalLM:
    return new_network(new_tokenizer(["abc"], options), options)


def test_loss_of_a_network_that_knows_nothing_is_the_logarithm_of_the_vocabulary() -> None:
    """Embeddings of zero make every logit zero, as input and output share them: -log(1/V) a token, whatever the rows."""
    model = network()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    rows = torch.arange(5 * 8).view(5, 8)
    assert evaluate(model, rows, micro_batch=2) == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)


def test_loss_is_the_mean_over_all_tokens_but_the_first_of_a_row() -> None:
    """Against float64 probabilities of an eager float32 pass; autocast rounds logits to 8 bits, a few 1e-3 of a nat."""
    model = network().eval()
    rows = torch.randint(0, model.config.vocab_size, (5, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        probabilities = model(input_ids=rows).logits.double().softmax(-1)
    terms = [-math.log(probabilities[i, t, rows[i, t + 1]]) for i in range(5) for t in range(7)]
    assert evaluate(model, rows, micro_batch=2) == pytest.approx(sum(terms) / 35, abs=5e-3)


def trained(options: PretrainOptions, rows: torch.Tensor) -> tuple[Qwen2ForCausalLM, list[dict[str, float]]]:
    model = network(options)
    generator = torch.Generator().manual_seed(options.seed)
    return model, train(model, *split(rows, generator), options, generator)


CYCLE = torch.arange(41 * 33).remainder(11).view(41, 33) + 20
"""Rows that count round a circle of 11 tokens: each token has one successor."""


def test_training_learns_what_follows_what() -> None:
    """Without the token before, the loss would be log 11 = 2.4 at best; two numbers of steps: ceil(40 / 4) an epoch."""
    options = PretrainOptions(**SIZES, micro_batch=4, epochs=6, lr=0.02)
    _, history = trained(options, CYCLE)
    assert [epoch["step"] for epoch in history] == [10, 20, 30, 40, 50, 60]
    assert history[0]["train_loss"] > math.log(11) > 0.5 > history[-1]["validation_loss"]


def test_micro_batches_change_nothing_but_rounding() -> None:
    """Three rows of one kind and one of another, in parts of 3 and 1: each row weighs a quarter, in loss and gradient.

    A mean of the two parts' means would weigh the odd row a half: its gradient is turned by far more than bfloat16 turns it.
    """
    rows = torch.cat([torch.full((3, 32), 7), torch.arange(32).view(1, 32) + 100])
    losses, gradients = [], []
    for parts in ([rows], [rows[:3], rows[3:]]):
        model = network()
        losses.append(_step(model, torch.optim.SGD(model.parameters()), parts, rate=0.0))
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]).double())
    alike = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert alike > 0.999


def test_a_loss_that_is_no_number_ends_training() -> None:
    model = network()
    model.get_input_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="step 0: the loss is nan"):
        train(model, CYCLE[1:], CYCLE[:1], TINY, torch.Generator())


# -- the base ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_bits_and_another_makes_others(root: Path, texts: list[Path], tmp_path: Path) -> None:
    again, order = tmp_path / "again", list(reversed(texts))
    bases = [make_base(texts, root, tmp_path / "base", TINY), make_base(order, root, again, TINY)]
    other = make_base(texts, root, tmp_path / "other", PretrainOptions(**SIZES, micro_batch=4, epochs=2, lr=0.01, seed=1))
    for name in (WEIGHTS, "tokenizer.json", "config.json"):
        assert (bases[0] / name).read_bytes() == (bases[1] / name).read_bytes()
    assert (other / WEIGHTS).read_bytes() != (bases[0] / WEIGHTS).read_bytes()
    first_weights = [network(PretrainOptions(**SIZES, seed=seed)).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(first_weights[0], first_weights[1]) and not torch.equal(first_weights[0], first_weights[2])
    assert read_json(again / RECORD)["epochs"] == read_json(bases[0] / RECORD)["epochs"]


def test_a_base_loads_as_a_model_of_ones_own_and_its_record_holds(root: Path, texts: list[Path], tmp_path: Path) -> None:
    """The validation loss of the record is that of the weights on disk over the rows that the seed holds out."""
    base = make_base(texts, root, tmp_path / "base", TINY)
    options = ModelOptions(path=str(base))
    model, tokenizer = load_base(options, {"zero_optimization": {"stage": 0}}), load_tokenizer(options)
    record = read_json(base / RECORD)
    generator = torch.Generator().manual_seed(TINY.seed)
    training, validation = split(pack(read_corpus(sorted(texts), root, 2), tokenizer, TINY.block, generator), generator)
    assert record["validation_loss"] == pytest.approx(evaluate(model, validation, 4), abs=1e-6)
    assert record["validation_loss"] < math.log(len(tokenizer))
    assert record["parameters"] == model.num_parameters()
    assert (record["training_tokens"], record["tokens_seen"]) == (training.numel(), 2 * training.numel())
    assert record["steps"] == 2 * math.ceil(len(training) / 4) == record["epochs"][-1]["step"]
    assert record["documents"]["first"] == 2 and record["documents"]["lines.txt"] == 42
    assert record["inputs"] == fingerprint(texts, root) and record["options"]["lr"] == 0.01
    assert {path.name for path in base.iterdir()} >= {"config.json", "generation_config.json", "tokenizer.json"}
    assert "assistant" in tokenizer.apply_chat_template(chat("Hello"), tokenize=False, add_generation_prompt=True)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not list(tmp_path.glob("*.partial"))


def test_a_base_that_stands_is_not_made_again(root: Path, texts: list[Path], tmp_path: Path) -> None:
    """Neither under the folder that the user names nor under that of the cache; other inputs have another place there."""
    in_cache = make_base(texts, root, None, TINY)
    for base, to in ((make_base(texts, root, tmp_path / "base", TINY), tmp_path / "base"), (in_cache, None)):
        before = _written(base)
        assert make_base(texts, root, to, TINY) == base
        assert _written(base) == before
    (root / "second" / "test.json").write_text(json.dumps([row("rho", "held out now")]), encoding="utf-8")
    assert make_base(texts, root, None, TINY) != in_cache
    with pytest.raises(UserError, match="holds something else than these files"):
        make_base(texts, root, tmp_path / "base", TINY)


def _written(base: Path) -> list[tuple[str, int, int]]:
    return sorted((path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in [base, *base.iterdir()])


def test_what_stands_in_the_way_is_left_alone(root: Path, texts: list[Path], tmp_path: Path) -> None:
    base = make_base(texts, root, tmp_path / "base", TINY)
    with open(base / WEIGHTS, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match="weights are not those that were made"):
        make_base(texts, root, base, TINY)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("three years")
    with pytest.raises(UserError, match="name another folder"):
        make_base(texts, root, mine, TINY)
    assert (mine / "thesis.txt").read_text() == "three years"


@pytest.mark.parametrize(("name", "parameters"), [("small", 4_461_824), ("gpu", 126_000_000)])
def test_presets_have_the_sizes_that_they_say(name: str, parameters: int) -> None:
    """small: 4096 x 256 + 4 x (4 x 256^2 + 3 x 256 + 3 x 256 x 768 + 2 x 256) + 256 (biases of q, k and v; tied output)."""
    options = PretrainOptions(**PRESETS[name])
    h, f = options.hidden_size, options.intermediate_size
    counted = options.vocab_size * h + options.layers * (4 * h * h + 3 * h + 3 * h * f + 2 * h) + h
    assert counted == pytest.approx(parameters, rel=0.005)
    with torch.device("meta"):
        model = new_network(_Vocabulary(options.vocab_size), options)  # type: ignore[arg-type]
    assert model.num_parameters() == counted


class _Vocabulary:
    """What a network wants to know of its tokenizer: training one of 16,384 tokens takes texts."""

    pad_token_id, eos_token_id = 0, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def test_the_page_names_every_option_with_the_presets_values() -> None:
    page = (REPOSITORY / "docs" / "pretraining.md").read_text(encoding="utf-8")
    told = {name: cells for name, *cells in re.findall(r"^\| `--([\w-]+)` \| (\S+) \| (\S+) \|", page, re.MULTILINE)}
    small, gpu = (dataclasses.asdict(PretrainOptions(**PRESETS[name])) for name in ("small", "gpu"))
    assert told.keys() == {name.replace("_", "-") for name in small}
    for name, value in small.items():
        assert [float(cell) for cell in told[name.replace("_", "-")]] == [value, gpu[name]], name


# -- the command -------------------------------------------------------------------------------------------------------

LAUNCHER: dict[str, Any] = {}


def pretrain(*arguments: str | Path) -> Ended:
    """The launcher, in this process."""
    if not LAUNCHER:
        LAUNCHER.update(runpy.run_path(str(REPOSITORY / "launch" / "pretrain.py")))

    def main() -> None:
        with exit_codes():
            LAUNCHER["main"]()

    return end_here(main, *map(str, arguments))


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_the_command_makes_a_base_and_says_where(root: Path, texts: Sequence[Path], tmp_path: Path) -> None:
    to = tmp_path / "deep" / "base"
    ended = pretrain("--text", *texts, "--root", root, "--to", to, *flags(SIZES), "--epochs", "1", "--skip-train", "2")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == f"the base: {to}"
    assert "nats a token" in ended.out
    assert read_json(to / RECORD)["options"] == {
        **SIZES, "micro_batch": 2, "epochs": 1, "lr": 3e-3, "skip_train": 2, "seed": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to read"),
        (["--text", "absent.txt"], "absent.txt: no such file"),
        (["--text", "picture.png"], "picture.png: must end in .txt"),
        (["--root", "absent"], "no folder 'absent'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--skip-train", "-1"], "--skip-train -1: must be at least 0"),
        (["--lr", "nan"], "--lr nan: must lie between 0 and 1"),
        (["--heads", "3"], "--hidden-size 256: must be an even multiple of --heads 3"),
        (["--vocab-size", "100"], "--vocab-size 100: must be at least 259"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], said: str) -> None:
    ended = pretrain(*arguments)
    assert ended.code == 2
    assert said in ended.err and ended.err.startswith("error: ") and ended.err.count("\n") == 1


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pretrain("--text", "any.txt").err == "error: pre-training runs in one process; start it with python\n"


def test_too_little_text_and_rows_of_no_known_form_are_told(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(UserError, match="two rows are needed"):
        make_base([tmp_path / "short.txt"], None, tmp_path / "base", PretrainOptions())
    (tmp_path / "odd.jsonl").write_text('{"text": "fine"}\n{"words": "what"}\n')
    with pytest.raises(UserError, match=r"odd\.jsonl, line 1: .*'output' is missing.*; a row holds 'text', or"):
        read_corpus([tmp_path / "odd.jsonl"], None, 0)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 text"):
        read_corpus([tmp_path / "latin.txt"], None, 0)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "short.txt").write_text("Another.")
    with pytest.raises(UserError, match=r"two files are named 'short\.txt'"):
        fingerprint([tmp_path / "short.txt", tmp_path / "deep" / "short.txt"], None)
    assert Corpus().words() == []


def test_nothing_left_to_read_is_told_before_a_tokenizer_is_trained(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for given in (["--root", root], ["--text", tmp_path / "empty.txt"]):
        ended = pretrain(*given, "--to", tmp_path / "base", "--skip-train", "100")
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert ended.err.startswith("error: --skip-train 100: no document is left: ")


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "file"
    text.write_text("word\n")
    file.touch()
    with pytest.raises(UserError, match=r"^--to: .*file cannot be written \("):
        make_base([text], None, file / "base", PretrainOptions())
