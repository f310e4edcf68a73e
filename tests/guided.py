"""What reads files, fed by atheris with bytes that lead to ever new lines of it: a line or a use, never a traceback or a hang.

    pip install atheris
    python tests/guided.py rows.jsonl -max_total_time=60      # or another of TARGETS; options are libFuzzer's

Ends with 0 where all was well; else with the traceback, and the bytes in a file ``crash-...`` of the working directory.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lifealign"]):
    from lifealign.assets import SIX_DOMAINS
    from lifealign.comparison.runs import read_runs
    from lifealign.config import build, load_run
    from lifealign.data.files import read_rows
    from lifealign.data.options import Columns
    from lifealign.data.rules import read_preferences
    from lifealign.errors import UserError, printable
    from lifealign.memory import bank
    from lifealign.runtime import checkpoint

Target = tuple[str, Callable[[Path], object], bytes]
"""The file that gets the bytes, below a folder; what reads the folder; bytes to begin with."""

ROW = (SIX_DOMAINS / "instruct" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
MANIFEST = {"state.json": {"bytes": 2, "sha256": "0" * 64}, "tensors.safetensors": {"bytes": 0, "sha256": "0" * 64}}


def rows(name: str) -> Callable[[Path], object]:
    return lambda folder: read_preferences(read_rows(folder / name), "task", Columns(), max_empty=1.0)


def newest_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "00001" / checkpoint.STATE).write_text("{}")
    (folder / "checkpoints" / "00001" / checkpoint.TENSORS).write_bytes(b"")
    checkpoint.newest(folder / "checkpoints")


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        parquet.write_table(pyarrow.Table.from_pylist([json.loads(ROW)]), file.name)
        return Path(file.name).read_bytes()


TARGETS: dict[str, Target] = {
    "rows.jsonl": ("train.jsonl", rows("train.jsonl"), ROW.encode()),
    "rows.json": ("train.json", rows("train.json"), f"[{ROW}]".encode()),
    "rows.jsonl.gz": ("train.jsonl.gz", rows("train.jsonl.gz"), gzip.compress(ROW.encode(), mtime=0)),
    "rows.parquet": ("train.parquet", rows("train.parquet"), parquet()),
    "config": ("config.yaml", lambda folder: build(load_run(folder)), b"sequence: {name: a, tasks: [instruct]}\nseed: 1\n"),
    "manifest": (
        "checkpoints/00001/manifest.json",
        newest_checkpoint,
        json.dumps(checkpoint._manifest(MANIFEST)).encode(),
    ),
    "ledger": ("ledger.json", bank.read_ledger, json.dumps({"entries": [{"name": "000_a_sft", "hashes": {}}]}).encode()),
    "scores": (
        "scores.json",
        lambda folder: read_runs([folder]),
        b'{"tasks": ["a", "b"], "metrics": {"rouge_l": {"matrix": [[1, null], [0.5, 2e1]]}}}',
    ),
}


def main() -> None:
    name, *options = sys.argv[1:]
    place, read, seed = TARGETS[name]
    work = Path(tempfile.mkdtemp())
    corpus, folder = work / "corpus", work / "folder"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)
    (folder / place).parent.mkdir(parents=True)
    if name == "scores":
        (folder / "config.yaml").write_text("sequence: {name: a}\n")

    def one(content: bytes) -> None:
        (folder / place).write_bytes(content)
        try:
            read(folder)
        except UserError as error:
            line = printable(str(error))
            assert line and len(line) < 3000 and len(line.splitlines()) == 1 and line.isprintable()

    one(seed)
    # A call that takes longer than half a minute counts as one that hangs.
    atheris.Setup([sys.argv[0], str(corpus), "-timeout=30", "-rss_limit_mb=4096", *options], one)
    try:
        atheris.Fuzz()  # ends the process
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
