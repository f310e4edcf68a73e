"""Files in every format, the mistakes they can hold, and hub data sets (from local folders)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lifealign.data.files import read_rows, read_task, task_folders
from lifealign.data.hub import hold_out, read_hub
from lifealign.data.options import HubSource
from lifealign.data.rows import Rows
from lifealign.errors import UserError

ROWS = [{"prompt": f"q{n}", "chosen": [{"role": "assistant", "content": "a\u2028é"}], "rejected": "b"} for n in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def mistake(text: str, name: str = "train.json", *, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(write(folder / name, text))
    message = str(caught.value)
    assert "\n" not in message and str(folder / name) in message
    return message.replace(str(folder / name), "FILE")


@pytest.mark.parametrize(
    "name, text",
    [
        ("train.json", json.dumps(ROWS)),
        ("train.json", "\ufeff" + json.dumps(ROWS, indent=1)),
        ("train.jsonl", LINES + "\n\n"),
        ("train.json.gz", json.dumps(ROWS)),
        ("train.jsonl.gz", LINES),
    ],
)
def test_json_in_every_wrapping(tmp_path: Path, name: str, text: str) -> None:
    rows = read_rows(write(tmp_path / name, text))
    assert (rows.items, list(rows.numbers), rows.split) == (ROWS, [0, 1, 2], "train")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "dev.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    rows = read_rows(path)
    assert (rows.items, rows.split, rows.where(2)) == (ROWS, "dev", f"{path}, row 3")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(path)
    assert read_rows(path).items == ROWS[:1]  # nothing is remembered of the file before
    packed = tmp_path / "train.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert (read_rows(packed).items, read_rows(packed).source) == (ROWS[:1], str(packed))
    path.write_text("not parquet")
    packed.write_bytes(gzip.compress(b"not parquet"))
    for bad in (path, packed):
        with pytest.raises(UserError, match=rf"^{bad}: not a Parquet file"):
            read_rows(bad)


def test_unreadable_files_name_file_and_line(tmp_path: Path) -> None:
    lines = LINES.split("\n")
    assert mistake('[\n{},\n{"a": }]', folder=tmp_path).startswith("FILE, line 3: not JSON (Expecting value, column 7)")
    assert mistake(LINES, folder=tmp_path).endswith("it looks like JSON Lines: rename it to train.jsonl")
    assert mistake("{}", folder=tmp_path).startswith("FILE: must be a JSON array of objects")
    assert mistake("[{}, 3]", folder=tmp_path) == "FILE, row 2: a row must be a JSON object; found the number 3"
    assert mistake("[]", folder=tmp_path) == "FILE: no rows in this file"
    broken = f"{lines[0]}\n\n{lines[1][:-1]}\n"
    assert mistake(broken, "train.jsonl", folder=tmp_path).startswith("FILE, line 3: not JSON (Expecting ',' delimiter")
    (tmp_path / "train.json.gz").write_bytes(b"[]")
    with pytest.raises(UserError, match=r"train.json.gz: not a gzip file"):
        read_rows(tmp_path / "train.json.gz")
    (tmp_path / "train.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match=r"not UTF-8 text"):
        read_rows(tmp_path / "train.json")


def test_a_task_is_a_folder_with_train_and_test_or_dev(tmp_path: Path) -> None:
    text = json.dumps(ROWS)
    write(tmp_path / "hc3/train.json", text)
    with pytest.raises(UserError, match=r"has no test or dev file; looked for test.json, test.jsonl, .*dev.parquet.gz$"):
        read_task(tmp_path, "hc3")
    write(tmp_path / "hc3/dev.json", text)
    assert [rows.split for rows in read_task(tmp_path, "hc3")] == ["train", "dev"]
    write(tmp_path / "hc3/test.jsonl", LINES)
    assert [rows.split for rows in read_task(tmp_path, "hc3")] == ["train", "test"]
    write(tmp_path / "hc3/train.jsonl.gz", LINES)
    with pytest.raises(UserError, match=r"holds train.json and train.jsonl.gz; keep one of them"):
        read_task(tmp_path, "hc3")
    with pytest.raises(UserError, match=r"no folder '.*hc4' for task 'hc4'; did you mean 'hc3'\?"):
        read_task(tmp_path, "hc4")


def test_a_root_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.root: no folder"):
        task_folders(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no task's folder"):
        task_folders(tmp_path)
    write(tmp_path / "train.json", "[]")
    with pytest.raises(UserError, match=r"is a task's own folder; give the folder above it"):
        task_folders(tmp_path)


def hub_folder(folder: Path, **splits: int) -> str:
    """A folder that ``datasets.load_dataset`` reads as it reads a hub repository."""
    for split, count in splits.items():
        write(folder / f"{split}.jsonl", "\n".join(json.dumps({"question": f"{split} {n}"}) for n in range(count)))
    return str(folder)


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_hub_splits(tmp_path: Path) -> None:
    train, test = read_hub(HubSource(path=hub_folder(tmp_path / "set", train=3, test=2)))
    assert [row["question"] for row in train.items] == ["train 0", "train 1", "train 2"]
    assert ([row["question"] for row in test.items], test.split) == (["test 0", "test 1"], "test")
    folder = hub_folder(tmp_path / "other/harmless-base", train=1, test=1)
    train, _ = read_hub(HubSource(path=str(Path(folder).parent), data_dir="harmless-base"))
    assert train.items == [{"question": "train 0"}]


def test_hub_without_a_test_split_holds_rows_out(tmp_path: Path) -> None:
    """10 % of 20 rows are 2; together the parts are the split, each with the row numbers of the split."""
    source = HubSource(path=hub_folder(tmp_path / "set", validation=20), train_split="validation", eval_split=None)
    train, test = read_hub(source)
    assert (len(train.items), len(test.items)) == (18, 2)
    assert sorted([*train.numbers, *test.numbers]) == list(range(20))
    assert all(rows.items[i]["question"] == f"validation {n}" for rows in (train, test) for i, n in enumerate(rows.numbers))
    assert list(read_hub(source)[1].numbers) == list(test.numbers)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_hold_out_leaves_something_on_both_sides(share: float) -> None:
    rows = Rows("hub", "train", [{}] * 4, range(4))
    with pytest.raises(UserError, match=r"hub.eval_share"):
        hold_out(rows, share)


@pytest.mark.parametrize("change", [{"path": "/no/such/set"}, {"eval_split": "tset"}, {"name": "no_such_configuration"}])
def test_hub_mistakes_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    options = {"path": hub_folder(tmp_path / "set", train=1, test=1), **change}
    with pytest.raises(UserError, match=r"^hub data set '.*', split '.*': .*data.root=FOLDER$") as caught:
        read_hub(HubSource(**options))
    assert "\n" not in str(caught.value)
