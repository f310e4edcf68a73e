"""Anything at all in the place of rows, presets, manifests, ledgers and scores: a line or a use, never a traceback or a hang.

A few dozen examples each; ``make test-all`` takes many more.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import end_here, train_here

from lifealign.assets import SIX_DOMAINS
from lifealign.command import hydra_command
from lifealign.comparison.runs import read_runs
from lifealign.config import build, load_run
from lifealign.data.files import read_rows, read_task
from lifealign.data.options import Columns
from lifealign.data.rows import Rows
from lifealign.data.rules import read_preferences
from lifealign.data.tokenize import PairTokenizer
from lifealign.errors import UserError, printable
from lifealign.evaluation.scores import ScoreBook
from lifealign.memory import bank
from lifealign.models.loading import load_tokenizer
from lifealign.models.options import ModelOptions
from lifealign.runtime import checkpoint
from lifealign.runtime.files import json_text

MANY = pytest.mark.slow
FEW = 60


def fuzzed(*strategies: st.SearchStrategy[Any], examples: int = FEW, many: int = 1500) -> Callable[[Callable[..., None]], Any]:
    """Two tests of a function of a folder and examples: a short one, always with the same, and a slow one with many others."""

    def wrap(function: Callable[..., None]) -> Any:
        def run(count: int, tmp_path: Path) -> None:
            quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
            options = {"max_examples": count, "deadline": None, "database": None, "derandomize": count == examples}

            @settings(**options, suppress_health_check=quiet)
            @given(st.tuples(*strategies))
            def each(values: tuple[Any, ...]) -> None:
                function(tmp_path, *values)

            each()

        run.__doc__ = function.__doc__
        return pytest.mark.parametrize("count", [examples, pytest.param(many, marks=MANY)])(run)

    return wrap


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
COLUMN_WORDS = "prompt", "chosen", "rejected", "role", "content", "from", "value", "user", "assistant"
WORDS = st.sampled_from([*COLUMN_WORDS, "Human: a\n\nAssistant: b", "\x1b[2J", "\u202e", "\ud800"])
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(st.fixed_dictionaries({"role": WORDS, "content": WORDS | VALUES}), max_size=3)
ROWS = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "instruction", "input", "promt"]), WORDS | TURNS | VALUES
)


def in_one_line(error: Exception) -> None:
    line = printable(str(error))
    assert line and len(line) < 3000 and len(line.splitlines()) == 1 and line.isprintable()


@fuzzed(st.lists(ROWS, min_size=1, max_size=4))
def test_rows(_: Path, items: list[dict[str, Any]]) -> None:
    rows = Rows("file", "train", items, range(len(items)))
    try:
        kept, _dropped = read_preferences(rows, "task", Columns(), max_empty=1.0)
    except UserError as error:
        in_one_line(error)
        return
    assert all(p.chosen and p.rejected and p.prompt[-1]["role"] == "user" for p in kept)
    json.dumps([[p.prompt, p.chosen, p.rejected] for p in kept], ensure_ascii=False).encode("utf-8")


GOOD = "\n".join((SIX_DOMAINS / "instruct" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:3]).encode()


def spoilt(content: bytes) -> st.SearchStrategy[bytes]:
    """A file cut, with bytes turned or put in, or something else altogether."""
    places = st.integers(0, len(content))
    cut = places.map(lambda at: content[:at])
    put = st.tuples(
        places, st.binary(max_size=6) | st.sampled_from([b"[" * 5000, b"9" * 5000, b"\x00", b"\xff", b'{"a":1,"a":2}'])
    )
    return cut | put.map(lambda p: content[: p[0]] + p[1] + content[p[0] + len(p[1]) % 3 :]) | st.binary(max_size=50)


@fuzzed(spoilt(GOOD), st.sampled_from(["train.jsonl", "train.json", "train.jsonl.gz"]), st.booleans())
def test_files_of_rows(folder: Path, content: bytes, name: str, packed: bool) -> None:
    path = folder / name
    path.write_bytes(gzip.compress(content) if packed and name.endswith(".gz") else content)
    try:
        rows = read_rows(path)
        read_preferences(rows, "task", Columns(), max_empty=1.0)
    except UserError as error:
        in_one_line(error)
        assert str(path) in str(error)


def sealed(entries: list[Any]) -> list[Any]:
    """As somebody who may write to the folder would seal them."""
    before = ""
    for entry in entries:
        if isinstance(entry, dict):
            entry["seal"] = before = bank._seal(entry, before)
    return entries


ENTRIES = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["000_a_sft", "../../out", "/etc", ""]) | VALUES},
        optional={"hashes": st.fixed_dictionaries({}, optional={"details": SCALARS}) | VALUES, "task": VALUES, "space": VALUES},
    )
    | VALUES,
    max_size=3,
)


@fuzzed(ENTRIES, st.booleans(), VALUES, st.booleans())
def test_ledgers(folder: Path, entries: list[Any], seal: bool, details: Any, hashed: bool) -> None:
    content = json.dumps(details).encode()
    (folder / "000_a_sft").mkdir(exist_ok=True)
    (folder / "000_a_sft" / "details.json").write_bytes(content)
    for entry in entries if hashed else ():
        if isinstance(entry, dict):
            entry["hashes"] = {"details": hashlib.sha256(content).hexdigest()}
    (folder / "ledger.json").write_text(json.dumps({"entries": sealed(entries) if seal else entries}))
    try:
        found = bank.read_ledger(folder)
    except UserError as error:
        in_one_line(error)
        return
    assert all(entry["name"] == "000_a_sft" for entry in found)  # the only folder there is


SEALS = st.fixed_dictionaries({"bytes": VALUES, "sha256": VALUES | st.just("0" * 64)})


def manifest_of(seals: Any) -> Any:
    """Sealed as the product does it, where that can seal them at all."""
    try:
        return json_text(checkpoint._manifest(seals)).encode()
    except (ValueError, TypeError):  # a number that JSON has not, or no mapping
        return {"files": seals}


SEALED = (st.dictionaries(WORDS, SEALS | VALUES) | VALUES).map(manifest_of)


@fuzzed(VALUES | st.binary(max_size=40) | st.sampled_from([b"[" * 5000]) | SEALED)
def test_manifests(folder: Path, manifest: Any) -> None:
    """Whatever it says of other files, the two files of a checkpoint must be what it says."""
    place = folder / "checkpoints" / "00001"
    place.mkdir(parents=True, exist_ok=True)
    (place / checkpoint.STATE).write_text("{}")
    (place / checkpoint.TENSORS).write_bytes(b"")
    content = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (place / checkpoint.MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match="no checkpoint is as it was written"):
        checkpoint.newest(folder / "checkpoints")
    assert place.is_dir()


MATRICES = st.lists(st.lists(st.floats() | st.none() | st.integers() | VALUES, max_size=3), max_size=3)
METRICS = st.dictionaries(st.text(max_size=4) | WORDS, st.fixed_dictionaries({"matrix": MATRICES | VALUES}))
SCORES = VALUES | st.fixed_dictionaries(
    {"tasks": st.lists(WORDS, max_size=3) | VALUES},
    optional={"metrics": METRICS | VALUES},
)


@fuzzed(SCORES)
def test_scores(folder: Path, scores: Any) -> None:
    """As ``compare.py`` reads them: refused in a line, or every score is the number that the file says, or none."""
    (folder / "config.yaml").write_text("sequence: {name: a}\n")
    (folder / "scores.json").write_text(json.dumps(scores))
    try:
        runs, left_out = read_runs([folder])
    except UserError as error:
        in_one_line(error)
        return
    assert len(runs) + len(left_out) == 1
    book = runs[0].result.book if runs else ScoreBook.from_json(scores)
    assert book.tasks == [str(task) for task in scores["tasks"]]
    assert book.metrics == list(scores["metrics"])
    for metric in book.metrics:
        told = [value for row in scores["metrics"][metric]["matrix"] for value in row]
        read = [value for row in book.matrix(metric) for value in row]
        assert read == [None if value is None or not math.isfinite(value) else value for value in told]


PRESET = r"""
name: a
tasks: [instruct]
tasks: [x, {}]
tasks: ${sequence.name}
tasks: [a/b]
name: '../../x'
name: ${name}
name: ${oc.env:HOME}
sources: {instruct: {of: instruct}}
sources: {1: 2}
sources: ${oc.decode:'{'}
defaults: [x]
defaults: [{a: b}]
defaults: 3
# @package _global_
# @package ../..
hydra: {run: 3}
zero: {stage: x}
? [a]
- a
a: &b [*b]
<<: 3
0
"""
GUIDED = "rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet", "config", "manifest", "ledger", "scores"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("target", GUIDED)
def test_guided(target: str, tmp_path: Path) -> None:
    """Twenty seconds of bytes that atheris chooses by the lines they lead to (``guided.py``)."""
    pytest.importorskip("atheris")
    words = [sys.executable, str(Path(__file__).with_name("guided.py")), target, "-max_total_time=20"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"Done \d{2,} runs", done.stderr), done.stderr[-1000:]


LINES = st.lists(st.sampled_from(PRESET.strip().splitlines()) | st.text(max_size=12), min_size=1, max_size=4)


@fuzzed(LINES, examples=12, many=200)
def test_presets(folder: Path, lines: list[str]) -> None:
    path = folder / "conf" / "sequence" / "fuzzed.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    ended = end_here(
        lambda: hydra_command(build), f"--config-dir={folder / 'conf'}", "+sequence=fuzzed", f"hydra.run.dir={folder}"
    )
    assert ended.code in (0, 2)
    assert ended.code == 0 or (len(ended.err.splitlines()) == 1 and ended.err.startswith("error: ")), ended.err


# -- one of each -------------------------------------------------------------------------------------------------------


def task(root: Path, rows: list[dict[str, Any]]) -> Path:
    folder = root / "instruct"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


ODD = [
    "\x00\x07\x1b[31m",
    "\u202eright to left",
    "شكرا जी ขอบคุณ 谢谢 👩‍👩‍👧",
    "a" * 100_000,
    "<script>alert(1)</script><|im_end|>",
    "\r\n\u2028\u2029\x85",
]


def test_odd_rows_are_trained_on(tmp_path: Path) -> None:
    """Control characters, other scripts, markup, long words: as data, and nothing else."""
    task(tmp_path / "rows", [{"prompt": f"say {odd}", "chosen": f"yes {odd}", "rejected": "no"} for odd in ODD])
    words = f"data.root={tmp_path / 'rows'}", "sequence.tasks=[instruct]", "sft.epochs=0", "preference.epochs=1"
    run = train_here(tmp_path / "run", *words, "data.max_response_tokens=64", "data.max_prompt_tokens=64")
    assert "<script>alert" not in (run / "report" / "index.html").read_text()
    assert len((run / "tasks" / "01_instruct" / "predictions.jsonl").read_text().split("\n")) == len(ODD) + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_text_of_ten_million_characters() -> None:
    """It is cut to the tokens it may have; the tokenizer reads all of it, in a time that grows as the text does."""
    tokenizer = PairTokenizer(load_tokenizer(ModelOptions(path="bundled")), 64, 64)
    row = {"prompt": "say", "chosen": "a" * 5_000_000 + " word" * 1_000_000, "rejected": "no"}
    preferences, _ = read_preferences(Rows("file", "train", [row], [0]), "task", Columns(), max_empty=0.0)
    ((pair,), _) = tokenizer.pairs(preferences, None)
    assert len(pair.chosen) == 64


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', "line 1: half of a surrogate pair"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}',
            "line 1: an object has the key 'chosen' twice",
        ),
        ('{"prompt": ' + "[" * 100_000, "line 1: it is nested too deeply"),
        ('{"prompt": ' + "[" * 500 + "]" * 500 + ', "chosen": "b", "rejected": "c"}', "line 1: "),
        ('{"prompt": ' + "9" * 10_000 + "}", "line 1: Exceeds the limit"),
        ('{"' + "k" * 10_000_000 + '": 1}', "line 1: column 'chosen' is missing"),
    ],
)
def test_rows_that_cannot_be(line: str, named: str, tmp_path: Path) -> None:
    folder = task(tmp_path, [])
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(line)
    with pytest.raises(UserError) as raised:
        read_preferences(read_task(tmp_path, "instruct")[0], "instruct", Columns(), max_empty=0.0)
    assert named in str(raised.value)
    in_one_line(raised.value)


def test_a_parquet_text_that_is_no_utf_8(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    offsets = pyarrow.py_buffer(struct.pack("<2i", 0, 1))
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\x9b")])
    parquet.write_table(pyarrow.table({name: text for name in ("prompt", "chosen", "rejected")}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet: not a Parquet file .*0x9b") as raised:
        read_rows(tmp_path / "train.parquet")
    in_one_line(raised.value)


def test_a_run_whose_configuration_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("4")
    with pytest.raises(UserError, match=r"config\.yaml: not what a run of this version writes") as raised:
        load_run(tmp_path)
    in_one_line(raised.value)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "cut", "bomb"])
def test_files_that_are_none(kind: str, tmp_path: Path) -> None:
    """None is waited for, and none fills the memory."""
    folder = task(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    path = folder / ("train.jsonl.gz" if kind in ("cut", "bomb") else "train.jsonl")
    (folder / "train.jsonl").unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "cut":
        path.write_bytes(gzip.compress(GOOD)[:-20])
    else:
        path.write_bytes(gzip.compress(bytes(200 << 20), compresslevel=9))
    named = {"cut": "not a gzip file", "bomb": "unpacks to more than 100 times"}.get(kind, "has no train file")
    with pytest.raises(UserError, match=named):
        read_task(tmp_path, "instruct")
