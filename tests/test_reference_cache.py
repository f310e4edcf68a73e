"""Reference log-probabilities on disk: found by content, safe for many processes, and never the end of a run.

The file is its own worker: ``torchrun --nproc_per_node 2 tests/test_reference_cache.py FOLDER`` is what
two ranks are asked to do.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_writer import BASE, ROOMY, keys, values
from support import QUICK, REPOSITORY, command, compose_config, end_here, environment, train_here

from lifealign import cache_command
from lifealign.assembly import make_policy
from lifealign.assets import SIX_DOMAINS, TINY_MODEL
from lifealign.command import hydra_command
from lifealign.config import build
from lifealign.data.tasks import load_tasks
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.models import scoring
from lifealign.models.adapter import factor_shapes, write_factors
from lifealign.models.base_hash import base_hash
from lifealign.models.loading import load_tokenizer, pad_token_id
from lifealign.models.options import CacheOptions
from lifealign.models.policy import Policy
from lifealign.models.reference_cache import ReferenceCache, cached_bases, reference_folder
from lifealign.models.scoring import ReferenceCounts, ReferenceLogps, pair_key
from lifealign.rescore import rescore
from lifealign.run import train
from lifealign.runtime import distributed
from lifealign.runtime.engine import inference_engine

OTHER = "b" * 64


def known(cache: ReferenceCache, *names: object) -> dict[bytes, tuple[float, ...]]:
    found = cache.lookup(keys(*names))
    assert found == {key: tuple(row) for key, row in zip(keys(*names), values(*names).tolist(), strict=True) if key in found}
    return found


def fill(folder: Path, *names: object, base: str = BASE, limit: int = ROOMY) -> Path:
    """The segment that a fresh cache object writes."""
    before = set(folder.rglob("*.safetensors"))
    ReferenceCache(folder, base, limit, {"model": "m", "dtype": "float32", "device": "cpu"}).add(keys(*names), values(*names))
    (segment,) = set(folder.rglob("*.safetensors")) - before
    return segment


class Loaded:
    """A policy with the pairs of a task, and what ``ensure`` says of them."""

    def __init__(self, *overrides: str) -> None:
        words = (*QUICK, "sequence.tasks=[instruct]", "data.max_train=7", "data.max_eval=3", *overrides)
        self.config = build(compose_config(*words))
        distributed.start()
        tokenizer = load_tokenizer(self.config.model)
        (task,) = load_tasks(self.config.sequence, self.config.data, tokenizer, SIX_DOMAINS)
        self.pairs: list[Pair] = [*task.train, *task.test]
        self.policy: Policy = make_policy(self.config, [task])
        self.sizes = {"batch_size": 4, "pad_token_id": pad_token_id(tokenizer)}

    def ensure(self, cache: Path | None, pairs: list[Pair] | None = None) -> tuple[ReferenceCounts, torch.Tensor]:
        pairs = self.pairs if pairs is None else pairs
        reference = ReferenceLogps(None if cache is None else CacheOptions(dir=str(cache)))
        with inference_engine(self.policy, self.config.zero) as module:
            counts = reference.ensure(module, self.policy, pairs, **self.sizes)
        return counts, reference.of(pairs)


def work(folder: Path) -> None:
    """Two ranks: one fills the cache whole (ZeRO 0), then the same ranks read it with a partitioned base (ZeRO 3)."""
    told = {}
    for zero in ("zero=0", "zero=3"):
        loaded = Loaded(zero, *(["zero.settings.stage3_param_persistence_threshold=0"] if zero == "zero=3" else []))
        counts, logps = loaded.ensure(folder / "cache")
        told[zero] = {"base": base_hash(loaded.policy), "counts": counts, "logps": logps.tolist()}
    (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps(told))
    distributed.barrier()  # a rank that leaves while another still talks to it may be aborted by gloo
    distributed.stop()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded()


def test_what_was_scored_before_an_end_is_in_the_cache(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten pairs, three a portion; the end comes in the third."""
    portions, score = [], scoring.score_pairs

    def ended(*arguments: Any, **options: Any) -> torch.Tensor:
        portions.append(len(arguments[2]))
        if len(portions) == 3:
            raise KeyboardInterrupt
        return score(*arguments, **options)

    monkeypatch.setattr(scoring, "PORTION", 3)
    monkeypatch.setattr(scoring, "score_pairs", ended)
    with pytest.raises(KeyboardInterrupt):
        loaded.ensure(tmp_path)
    assert loaded.ensure(tmp_path)[0] == ReferenceCounts(10, 6, 4)
    assert portions == [3, 3, 3, 3, 1]
    torch.testing.assert_close(loaded.ensure(tmp_path)[1], loaded.ensure(None)[1], rtol=1e-5, atol=1e-5)


# -- found by content --------------------------------------------------------------------------------------------------


def test_a_second_object_finds_what_a_first_has_written(tmp_path: Path) -> None:
    fill(tmp_path, "x", "y")
    assert len(known(ReferenceCache(tmp_path, BASE, ROOMY), "x", "y", "z")) == 2
    assert not known(ReferenceCache(tmp_path, OTHER, ROOMY), "x")


def test_an_object_sees_what_another_writes_later(tmp_path: Path) -> None:
    early = ReferenceCache(tmp_path, BASE, ROOMY)
    assert not known(early, "x")
    fill(tmp_path, "x")
    assert known(early, "x")


def test_what_was_computed_is_read_and_is_the_same(loaded: Loaded, tmp_path: Path) -> None:
    plain = loaded.ensure(None)
    assert loaded.ensure(tmp_path, loaded.pairs[:4])[0] == (4, 0, 4)
    counts, logps = loaded.ensure(tmp_path)
    assert counts == (10, 4, 6)
    torch.testing.assert_close(logps, plain[1], rtol=1e-5, atol=1e-4)
    again = loaded.ensure(tmp_path)
    assert again[0] == (10, 10, 0)
    assert again[1].equal(logps)
    assert again[1].dtype == torch.float32
    rows = sorted(base.pairs for base in cached_bases(reference_folder(str(tmp_path))))
    assert rows == [10], "only what was missing is written"


def test_other_token_ids_miss(loaded: Loaded, tmp_path: Path) -> None:
    first = loaded.pairs[0]
    moved = Pair(first.id, first.prompt + first.chosen[:1], first.chosen[1:], first.rejected, "", "", "")
    assert len({pair_key(first), pair_key(moved)}) == 2
    loaded.ensure(tmp_path, [first])
    assert loaded.ensure(tmp_path, [moved])[0].computed_pairs == 1


def test_the_hash_is_that_of_the_base_alone(loaded: Loaded, tmp_path: Path) -> None:
    expected = base_hash(loaded.policy)
    trained = Loaded("model.lora.target_modules=[q_proj,k_proj,o_proj,up_proj]", "model.lora.r=4")
    noise = {name: torch.randn(shape) for name, shape in factor_shapes(trained.policy.model).items()}
    write_factors(trained.policy.model, noise, dict.fromkeys(noise, 0))
    assert base_hash(trained.policy) == expected
    assert base_hash(Loaded("model.row_layout=concatenated").policy) == expected
    copied = shutil.copytree(TINY_MODEL, tmp_path / "elsewhere")
    assert base_hash(Loaded("model=custom", f"model.path={copied}", "model.dtype=float32").policy) == expected

    assert base_hash(Loaded("model.dtype=bfloat16").policy) != expected
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert base_hash(Loaded("model=custom", f"model.path={copied}", "model.dtype=float32").policy) != expected
    with torch.no_grad():
        norm = dict(trained.policy.base.named_parameters())["model.norm.weight"]
        norm[0] = torch.nextafter(norm[0], torch.tensor(9.0))  # the least that can change
    assert base_hash(trained.policy) != expected


def test_what_is_switched_off_writes_nothing(loaded: Loaded, tmp_path: Path) -> None:
    reference = ReferenceLogps(CacheOptions(enabled=False, dir=str(tmp_path)))
    reference.ensure(loaded.policy, loaded.policy, loaded.pairs[:1], **loaded.sizes)
    assert not list(tmp_path.iterdir())


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path("~/.cache/lifealign/reference").expanduser()
    for name in ("LIFEALIGN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert reference_folder(None) == home
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert reference_folder(None) == Path("xdg/lifealign/reference")
    monkeypatch.setenv("LIFEALIGN_CACHE", "ours")
    assert reference_folder(None) == Path("ours/reference")
    assert reference_folder("~/chosen") == Path("~/chosen/reference").expanduser()
    monkeypatch.setenv("LIFEALIGN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert reference_folder(None) == home


def test_a_bound_out_of_range() -> None:
    with pytest.raises(UserError, match=r"^cache\.max_mib=0: .*cache\.enabled=false"):
        build(compose_config("+sequence=six_domains", "cache.max_mib=0"))


# -- damage, and disks that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_damage_is_noticed_and_made_good(damage: str, loaded: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, expected = loaded.ensure(tmp_path)
    (segment,) = tmp_path.rglob("*.safetensors")
    whole = segment.read_bytes()
    flipped = bytes([*whole[:-3], whole[-3] ^ 1, *whole[-2:]])  # in a log-probability: nothing but the hash would tell
    segment.write_bytes({"flipped": flipped, "cut": whole[:-8], "emptied": b""}[damage])
    with caplog.at_level(logging.WARNING):
        counts, logps = loaded.ensure(tmp_path)
    assert counts == (10, 0, 10)
    assert logps.equal(expected)
    (line,) = (record.getMessage() for record in caplog.records if record.name.endswith("reference_cache"))
    assert str(segment) in line
    assert segment.read_bytes() == whole, "the same numbers are written to the same name"
    assert loaded.ensure(tmp_path)[0] == (10, 10, 0)


def test_a_damaged_segment_costs_its_own_pairs_alone(tmp_path: Path) -> None:
    bad = fill(tmp_path, "x")
    fill(tmp_path, "y")
    bad.write_bytes(b"\0" * 200)
    cache = ReferenceCache(tmp_path, BASE, ROOMY)
    assert known(cache, "x", "y").keys() == set(keys("y"))
    assert not bad.exists()


@pytest.mark.parametrize("obstacle", ["a file in the folder's place", "a folder in the segment's place"])
def test_a_cache_that_cannot_be_written_warns_once_and_no_more(
    obstacle: str, loaded: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if obstacle.startswith("a file"):
        (tmp_path / "reference").write_text("")
    else:
        loaded.ensure(tmp_path)
        (segment,) = tmp_path.rglob("*.safetensors")
        segment.unlink()
        (segment / "inside").mkdir(parents=True)
    reference = ReferenceLogps(CacheOptions(dir=str(tmp_path)))
    with caplog.at_level(logging.WARNING):
        for some in (loaded.pairs, [*loaded.pairs, Pair("", [5], [6, 2], [7, 2], "", "", "")]):
            assert reference.ensure(loaded.policy, loaded.policy, some, **loaded.sizes).cached_pairs == 0
    told = [record.getMessage() for record in caplog.records if record.name.endswith("reference_cache")]
    assert len([line for line in told if "is not written any more" in line]) == 1
    assert not list(tmp_path.rglob("*.partial"))


@contextmanager
def read_only(home: Path) -> Iterator[None]:
    """Inside, this process may not write there; root, who may anywhere, is somebody else meanwhile."""
    home.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        home.chmod(0o755)


def test_a_read_only_folder_is_read(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as name:  # all may enter it, which pytest's folders do not allow
        folder = Path(name)
        folder.chmod(0o755)
        bad, good = fill(folder, "x"), fill(folder, "y")
        bad.write_bytes(b"damaged")
        with read_only(good.parent):
            cache = ReferenceCache(folder, BASE, ROOMY)
            for _ in range(2):
                assert known(cache, "x", "y").keys() == set(keys("y"))
                cache.add(keys("z"), values("z"))
        assert bad.exists()
        told = [record.getMessage() for record in caplog.records]
        assert ["damaged" in line for line in told] == [True, False], "each is told once"


# -- size --------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_segments_leave_first_and_the_newest_never(tmp_path: Path) -> None:
    written = [fill(tmp_path, name, base=base) for name, base in (("a", BASE), ("b", OTHER), ("c", BASE))]
    for age, path in enumerate(written):
        os.utime(path, (1000 + age, 1000 + age))
    size = written[0].stat().st_size
    assert known(ReferenceCache(tmp_path, BASE, ROOMY), "a")  # makes it the one that was used last
    fourth = fill(tmp_path, "d", limit=3 * size)
    assert [path.exists() for path in written] == [True, False, True]
    fifth = fill(tmp_path, "e", limit=1)
    assert list(tmp_path.rglob("*.safetensors")) == [fifth]
    assert not fourth.exists()


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    segment = fill(tmp_path, "x")
    old, young = (segment.with_name(f".{segment.name}.{name}.partial") for name in ("1-old", "2-young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    fill(tmp_path, "y")
    assert (old.exists(), young.exists()) == (False, True)
    assert len(known(ReferenceCache(tmp_path, BASE, ROOMY), "x", "y")) == 2


# -- many processes ----------------------------------------------------------------------------------------------------


def test_four_writers_and_a_reader(tmp_path: Path) -> None:
    words = [sys.executable, str(REPOSITORY / "tests" / "cache_writer.py"), str(tmp_path)]
    writers = [subprocess.Popen([*words, str(n)], env=environment()) for n in range(4)]
    own = [f"of {n} {turn}{too}" for n in range(4) for turn in range(0, 20, 2) for too in ("", " too")]
    common = [f"common {turn}{too}" for turn in range(1, 20, 2) for too in ("", " too")]
    reader, seen = ReferenceCache(tmp_path, BASE, ROOMY), 0
    while any(writer.poll() is None for writer in writers):
        now = len(known(reader, *own, *common))  # which also compares the numbers
        assert now >= seen
        seen = now
        time.sleep(0.02)
    assert [writer.returncode for writer in writers] == [0] * 4
    assert len(known(reader, *own, *common)) == len(own) + len(common)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4 * 10 + 10
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_two_ranks_agree_whole_and_partitioned(loaded: Loaded, tmp_path: Path) -> None:
    """The ranks fill the cache with a whole base and read it with a partitioned one; then this process reads it."""
    ended = command("torchrun", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-2000:]
    one, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert {told["base"] for told in one.values()} == {base_hash(loaded.policy)}
    assert (one["zero=0"]["counts"], one["zero=3"]["counts"]) == ([10, 0, 10], [10, 10, 0])
    assert one["zero=0"]["logps"] == one["zero=3"]["logps"]
    counts, logps = loaded.ensure(tmp_path / "cache")
    assert counts == (10, 10, 0)
    assert logps.tolist() == one["zero=0"]["logps"]
    torch.testing.assert_close(logps, loaded.ensure(None)[1], rtol=1e-5, atol=1e-4)


# -- runs --------------------------------------------------------------------------------------------------------------


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in logged if row["kind"] == kind]


def total(run: Path, count: str) -> int:
    return sum(row[count] for row in rows(run, "reference"))


def test_the_second_job_of_a_sweep_makes_no_reference_pass(tmp_path: Path) -> None:
    small = (*QUICK, "data.max_train=8", "data.max_eval=4", "evaluation.metrics=[preference_accuracy,reward_margin]")
    jobs = ("objective.beta=0.1,0.2", f"hydra.sweep.dir={tmp_path}/sweep", f"cache.dir={tmp_path}/cache")
    assert end_here(lambda: hydra_command(train), "-m", *small, *jobs).code == 0
    held = sorted((tmp_path / "sweep").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime_ns)
    first, second = (path.parent for path in held)
    places = [(row.get("task"), row.get("after"), row.get("on")) for row in rows(second, "reference")]
    assert places == [
        *(("instruct", None, None), (None, "instruct", "instruct")),
        *(("hc3", None, None), (None, "hc3", "instruct"), (None, "hc3", "hc3")),
    ]
    assert total(first, "computed_pairs") == 2 * (8 + 4)
    assert (total(second, "computed_pairs"), total(second, "cached_pairs")) == (0, 2 * (8 + 4))

    plain = train_here(tmp_path / "plain", *small[len(QUICK) :], "objective.beta=0.2", "cache.enabled=false")
    assert total(plain, "computed_pairs") == 2 * (8 + 4)
    assert (second / "scores.json").read_text() == (plain / "scores.json").read_text()
    again = rescore(second, [])
    assert again.to_json("", "", 0)["metrics"] == json.loads((second / "scores.json").read_text())["metrics"]


# -- the command -------------------------------------------------------------------------------------------------------


def cache_py(*words: str) -> subprocess.CompletedProcess[str]:
    return command(sys.executable, str(REPOSITORY / "launch" / "cache.py"), *words)


def test_list_size_and_clear(tmp_path: Path) -> None:
    folder = reference_folder(str(tmp_path))
    fill(folder, "x", "y")
    fill(folder, "z")
    fill(folder, "x", base=OTHER).write_bytes(b"damaged")
    (folder / "notes.txt").write_text("not ours")
    listed = cache_py("list", "--dir", str(tmp_path)).stdout.splitlines()
    assert listed[0].split() == ["Base", "Model", "Dtype", "Device", "Pairs", "Size", "Last", "used"]
    lines = {line.split()[0]: line.split()[1:5] for line in listed[1:]}
    assert lines == {BASE[:12]: ["m", "float32", "cpu", "3"], OTHER[:12]: ["m", "float32", "cpu", "0"]}
    sized = cache_py("size", "--dir", str(tmp_path)).stdout
    whole = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert sized.startswith(f"{whole} B in ")
    assert "1.0 GiB" in sized
    assert cache_py("clear", "aaaa", "--dir", str(tmp_path)).stdout.startswith("removed ")
    assert [base.name for base in cached_bases(folder)] == [OTHER]
    assert cache_command.main(["clear", "--dir", str(tmp_path)]) == 0
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_an_empty_cache_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "size", "clear"):
        assert cache_command.main([action, "--dir", str(tmp_path)]) == 0
    assert [line.split(" in ")[0].split(" from ")[0] for line in capsys.readouterr().out.splitlines()][1:] == [
        "0 B",
        "removed 0 B",
    ]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["clear", "0123"], "clear 0123: the hash of no base begins like this"),
        (["clear", "c"], "clear c: the hashes of 2 bases begin like this"),
        (["list", "--dir", "nowhere"], "--dir nowhere: no such folder"),
        (["empty"], "invalid choice"),
        ([], "--help"),
    ],
)
def test_mistakes(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIFEALIGN_CACHE", str(tmp_path))
    for last in "de":
        fill(reference_folder(None), "x", base="c" * 63 + last)
    assert cache_command.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert len(cached_bases(reference_folder(None))) == 2


def test_the_command_imports_no_torch_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    asked = "import sys, lifealign.cache_command; print('torch' in sys.modules)"
    assert command(sys.executable, "-c", asked).stdout == "False\n"
    ended = cache_py("clear", "0123", "--dir", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
