"""The ledger on disk: written, read, damaged; and runs that go on from it bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lifealign.errors import UserError
from lifealign.memory import MemoryBank, Space
from lifealign.memory.bank import _digest, read_ledger, read_update
from lifealign.runtime import distributed
from lifealign.runtime.files import file_seal
from lifealign.strategies import Context, Run
from lifealign.strategies.lifealign import LifeAlign, MemoryDtype

Tensors = dict[str, torch.Tensor]
ABOUT = {"task": "hc3", "stage": "sft", "consolidated": True}
HASHES = {"data": "d" * 64, "configuration": "c" * 64}
RECORDS = [{"factor": "a", "update_norm": 1.5}]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(4, 2, generator=generator).bfloat16(),
        "empty": torch.zeros(7, 0),
        "column": torch.randn(6, 1, generator=generator),
    }


def equal(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    same = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)  # noqa: E731
    return actual.keys() == expected.keys() and all(same(actual[k], expected[k]) for k in expected)


def filled(folder: Path, entries: int = 1) -> MemoryBank:
    bank = MemoryBank(folder)
    for i in range(entries):
        bank.append({**ABOUT, "stage": ("sft", "preference")[i % 2]}, tensors(i), RECORDS, HASHES)
    return bank


def written_by(ranks: int, folder: Path, made: Tensors, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The entry that some ranks, played in turn, make of an update of which each holds every so-manieth tensor."""
    shares = [{name: made[name] for name in sorted(made)[rank::ranks]} for rank in range(ranks)]
    digests = [{name: _digest(value) for name, value in share.items()} for share in shares]
    entries = []
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "barrier", lambda: None)
        patch.setattr(distributed, "gather_objects", lambda value: digests if isinstance(value, dict) else [value])
        patch.setattr(distributed, "broadcast_object", lambda value: value)
        patch.setenv("WORLD_SIZE", str(ranks))
        for rank in range(ranks):
            patch.setenv("RANK", str(rank))
            bank = MemoryBank(folder)
            bank.append(ABOUT, shares[rank], RECORDS, HASHES)
            entries.append({**bank.entries[0], "date": "", "seal": ""})
    assert all(entry == entries[0] for entry in entries)
    return read_ledger(folder)[0]


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) == []
    bank = filled(tmp_path, 3)
    entries = read_ledger(tmp_path)
    assert [{k: v for k, v in e.items() if k not in ("tensors", "factors")} for e in entries] == bank.entries
    assert [entry["name"] for entry in entries] == ["000_hc3_sft", "001_hc3_preference", "002_hc3_sft"]
    for i, entry in enumerate(entries):
        assert equal(read_update(tmp_path, entry), tensors(i))
        assert entry["factors"] == RECORDS
        assert entry["consolidated"] is True
        assert entry["hashes"].items() >= HASHES.items()
        assert entry["tensors"].keys() == tensors().keys()
        assert (tmp_path / entry["name"] / "shard-0.safetensors").exists()


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    filled(tmp_path)
    (entry,) = read_ledger(tmp_path)
    found = read_update(tmp_path, entry, {"a", "column"}.__contains__)
    assert equal(found, {name: tensors()[name] for name in ("a", "column")})


def test_an_update_of_nothing(tmp_path: Path) -> None:
    """A rank may own no factor."""
    bank = MemoryBank(tmp_path)
    bank.append(ABOUT, {}, [], {})
    assert read_update(tmp_path, read_ledger(tmp_path)[0]) == {}


def test_rows_of_one_stack_and_views_are_written_whole(tmp_path: Path) -> None:
    """As consolidation makes them: rows of one tensor."""
    stack = torch.arange(24.0).view(2, 3, 4)
    bank = MemoryBank(tmp_path)
    bank.append(ABOUT, {"x": stack[0], "y": stack[1]}, [], {})
    assert equal(read_update(tmp_path, read_ledger(tmp_path)[0]), {"x": stack[0], "y": stack[1]})


def test_every_hash_follows_what_it_is_of() -> None:
    """A digest is of the dtype, the shape and each number, and not of how a tensor lies in memory."""
    a = torch.arange(12.0).view(3, 4)
    changed = a.clone()
    changed[2, 3] += 1e-6 * 11
    others = [changed, a.view(4, 3), a.double(), a.bfloat16(), a.view(torch.int32), -a, torch.zeros(3, 0), torch.zeros(0, 3)]
    assert len({_digest(one) for one in (a, *others)}) == 1 + len(others)
    assert _digest(a.T.contiguous().T) == _digest(a.clone()) == _digest(a)


def test_the_hash_of_an_update_follows_its_tensors_and_names(tmp_path: Path) -> None:
    def whole(update: Tensors, name: str) -> str:
        bank = MemoryBank(tmp_path / name)
        bank.append(ABOUT, update, RECORDS, HASHES)
        return bank.entries[0]["hashes"]["update"]

    a, b = tensors(0)["a"], tensors(1)["a"]
    known = whole({"x": a, "y": b}, "plain")
    assert whole({"y": b, "x": a}, "reordered") == known
    others = [
        whole(update, str(i)) for i, update in enumerate(({"x": b, "y": a}, {"x": a}, {"x": a, "z": b}, {"x": a, "y": -b}))
    ]
    assert len({known, *others}) == 5


def test_an_update_is_the_same_however_many_ranks_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by two or three ranks, read by one: the number of ranks may change between runs."""
    alone = written_by(1, tmp_path / "1", tensors(), monkeypatch)
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        entry = written_by(ranks, folder, tensors(), monkeypatch)
        assert entry == alone
        assert len(list((folder / entry["name"]).glob("shard-*"))) == ranks
        assert equal(read_update(folder, entry), tensors())
        assert equal(read_update(folder, read_ledger(folder)[0]), tensors())


def test_later_entries_are_forgotten_for_good(tmp_path: Path) -> None:
    """Three entries, taken up at one; what is then appended becomes the second, also for the next reader."""
    before = filled(tmp_path, 3)
    bank = MemoryBank(tmp_path)
    bank.load(before.entries[:1], {})
    assert len(bank.entries) == len(read_ledger(tmp_path)) == 1
    bank.append({**ABOUT, "stage": "preference"}, tensors(7), [], HASHES)
    entries = read_ledger(tmp_path)
    assert [entry["stage"] for entry in entries] == ["sft", "preference"]
    assert equal(read_update(tmp_path, entries[0]), tensors(0))
    assert equal(read_update(tmp_path, entries[1]), tensors(7))


def test_what_a_stopped_run_left_uncounted_is_no_part_of_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two ranks stopped before its entry counted; one rank goes on, and the second's shard is gone."""
    written_by(2, tmp_path, tensors(3), monkeypatch)
    (tmp_path / "ledger.json").unlink()
    bank = filled(tmp_path)
    assert equal(read_update(tmp_path, read_ledger(tmp_path)[0]), tensors(0))
    assert len(list((tmp_path / bank.entries[0]["name"]).glob("shard-*"))) == 1


# -- damage ------------------------------------------------------------------------------------------------------------


def told(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


NO_LEDGERS = ["", "{", "null", "[]", "{}", "\xff", '{"entries": 3}', '{"entries": null}', '{"entries": []}']


@pytest.mark.parametrize("text", NO_LEDGERS)
def test_a_ledger_that_is_none_is_written_again_by_a_run_that_goes_on(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint holds what stood in it; who has no checkpoint is told of the file."""
    before = filled(tmp_path, 2)
    whole = (tmp_path / "ledger.json").read_text()
    (tmp_path / "ledger.json").write_bytes(text.encode("latin-1"))
    if text != NO_LEDGERS[-1]:
        assert "ledger.json" in told(lambda: read_ledger(tmp_path))
    MemoryBank(tmp_path).load(before.entries, before.files)
    assert "ledger.json is not what was written" in capsys.readouterr().out
    assert (tmp_path / "ledger.json").read_text() == whole
    MemoryBank(tmp_path).load(before.entries[:1], before.files)  # a longer one is that of a run which was ended before it saved
    assert capsys.readouterr().out == ""


def test_the_files_of_the_entries_are_known_by_their_seals(tmp_path: Path) -> None:
    bank = filled(tmp_path / "memory", 2)
    files = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "memory").glob("*/*")}
    assert bank.files.keys() == files
    assert len(files) == 4
    assert all(file_seal(tmp_path / file) == seal for file, seal in bank.files.items())


@pytest.mark.parametrize(("key", "value"), [("task", "other"), ("date", "2020-01-01"), ("consolidated", False)])
def test_an_entry_that_was_changed_is_found(tmp_path: Path, key: str, value: Any) -> None:
    """Nor can one be left out or moved: a seal covers the entry and the seal before it."""
    filled(tmp_path, 3)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    ledger["entries"][1][key] = value
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    assert "001_hc3_preference is not what was written" in told(lambda: read_ledger(tmp_path))
    del ledger["entries"][1]
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    assert "002_hc3_sft is not what was written" in told(lambda: read_ledger(tmp_path))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_details_that_are_damaged_are_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    filled(tmp_path)
    damage(tmp_path / "000_hc3_sft" / "details.json")
    assert "000_hc3_sft/details.json" in told(lambda: read_ledger(tmp_path))


def test_a_ledger_without_seals_is_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(json.dumps({"entries": [{"name": "000_hc3_sft"}]}))
    assert "earlier version" in told(lambda: read_ledger(tmp_path))


@pytest.mark.parametrize("name", ["a", "b", "column"])
def test_a_flipped_bit_of_a_tensor_is_found(tmp_path: Path, name: str) -> None:
    filled(tmp_path)
    (entry,) = read_ledger(tmp_path)
    shard = tmp_path / entry["name"] / "shard-0.safetensors"
    content = bytearray(shard.read_bytes())
    start = content.find(tensors()[name].flatten().view(torch.uint8).numpy().tobytes())
    content[start + 3] ^= 1
    shard.write_bytes(content)
    text = told(lambda: read_update(tmp_path, entry))
    assert entry["name"] in text
    assert f"{name} is not what was written" in text


def test_no_flipped_bit_anywhere_goes_unseen(tmp_path: Path) -> None:
    """In the header too: it is an error, told in one line, or it changes nothing that is read."""
    filled(tmp_path)
    (entry,) = read_ledger(tmp_path)
    shard = tmp_path / entry["name"] / "shard-0.safetensors"
    content = shard.read_bytes()
    unseen = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        shard.write_bytes(flipped)
        try:
            assert equal(read_update(tmp_path, entry), tensors())
            unseen += 1
        except UserError as error:
            assert str(tmp_path / entry["name"]) in str(error)
            assert "\n" not in str(error)
    assert unseen < 0.1 * len(content)


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_truncated_file_is_an_error(tmp_path: Path, length: int) -> None:
    filled(tmp_path)
    (entry,) = read_ledger(tmp_path)
    shard = tmp_path / entry["name"] / "shard-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    assert str(shard) in told(lambda: read_update(tmp_path, entry))


def test_a_missing_shard_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank's, which held ``b`` and ``empty``; who wants neither does not miss it."""
    entry = written_by(2, tmp_path, tensors(), monkeypatch)
    (tmp_path / entry["name"] / "shard-1.safetensors").unlink()
    text = told(lambda: read_update(tmp_path, entry))
    assert entry["name"] in text
    assert "b is missing" in text
    assert read_update(tmp_path, entry, "a".__eq__).keys() == {"a"}


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    filled(tmp_path)
    (entry,) = read_ledger(tmp_path)
    (tmp_path / entry["name"]).rename(tmp_path / "elsewhere")
    assert "is missing" in told(lambda: read_update(tmp_path, entry))


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    filled(tmp_path)
    (entry,) = read_ledger(tmp_path)
    other = MemoryBank(tmp_path / "other")
    other.append(ABOUT, {name: value for name, value in tensors().items() if name != "column"}, [], {})
    shard = Path(entry["name"]) / "shard-0.safetensors"
    (tmp_path / shard).write_bytes((tmp_path / "other" / shard).read_bytes())
    assert "column is missing" in told(lambda: read_update(tmp_path, entry))


# -- a run that goes on ------------------------------------------------------------------------------------------------

FACTORS = {"q.lora_A.w": (3, 20), "q.lora_B.w": (12, 3), "v.lora_A.w": (3, 20), "v.lora_B.w": (7, 3)}


class Toy(nn.Module):
    """A model of nothing but factors; B is zero."""

    def __init__(self) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(FACTORS.items()):
            layer, factor, weight = name.split(".")
            if not hasattr(self, layer):
                self.add_module(layer, nn.Module())
            part = nn.Module()
            value = torch.randn(shape, generator=torch.Generator().manual_seed(i)) if factor == "lora_A" else torch.zeros(shape)
            part.register_parameter(weight, nn.Parameter(value))
            getattr(self, layer).add_module(factor, part)


class Journey:
    """A run of some strategy in a folder, without its training: a stage adds what a seed draws."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model, self.strategy = Toy(), LifeAlign(**options)
        self.run = Run(SimpleNamespace(model=self.model), folder, 0, "configuration", None, {}, 8)  # type: ignore[arg-type]
        self.strategy.setup(self.run)

    def stage(self, number: int) -> Any:
        task = SimpleNamespace(name=f"task{number // 2}", data_hash="data")
        context = Context(self.run, task, number // 2, ("sft", "preference")[number % 2])  # type: ignore[arg-type]
        self.strategy.begin_stage(context)
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        return self.strategy.end_stage(context)

    def factors(self) -> Tensors:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}


OPTIONS: dict[str, dict[str, Any]] = {
    "factors": {},
    "memory of two": {"memory_rank": 2},
    "bfloat16": {"memory_dtype": MemoryDtype.bfloat16},
    "bfloat16, memory of two": {"memory_dtype": MemoryDtype.bfloat16, "memory_rank": 2},
    "product": {"space": Space.product},
    "preference alone": {"consolidate_stages": ["preference"]},
    "product, preference alone": {"space": Space.product, "consolidate_stages": ["preference"]},
}


@pytest.mark.parametrize("count", [0, 3, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_taken_up_again_goes_on_bit_for_bit(tmp_path: Path, name: str, count: int) -> None:
    """Stopped after five stages, taken up at ``count``: factors, records and ledger are those of a run never stopped."""
    straight, first = (Journey(tmp_path / which, **OPTIONS[name]) for which in ("straight", "stopped"))
    for number in range(5):
        first.stage(number)
        if number == count - 1:
            state, at = first.strategy.state_dict(), first.factors()
    for number in range(count):
        straight.stage(number)
    if count == 0:
        state, at = Journey(tmp_path / "new", **OPTIONS[name]).strategy.state_dict(), Toy().state_dict()
    resumed = Journey(tmp_path / "stopped", **OPTIONS[name])
    resumed.model.load_state_dict(at)
    resumed.strategy.load_state_dict(state)
    for number in range(count, 7):
        assert straight.stage(number) == resumed.stage(number)
        assert equal(resumed.factors(), straight.factors())
    left, right = (read_ledger(tmp_path / which / "memory") for which in ("straight", "stopped"))
    undated = {"date": "", "seal": ""}  # the seal covers the date
    assert [{**entry, **undated} for entry in left] == [{**entry, **undated} for entry in right]
    json.dumps(left, allow_nan=False)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_adapter_is_its_start_and_the_sum_of_the_ledger(tmp_path: Path, name: str) -> None:
    """In the factors, or in their products; stages that were passed on count too."""
    journey = Journey(tmp_path, **OPTIONS[name])
    for number in range(6):
        journey.stage(number)
    entries = read_ledger(tmp_path / "memory")
    wanted = ["preference"] if "preference" in name else ["sft", "preference"]
    assert [entry["consolidated"] for entry in entries] == [entry["stage"] in wanted for entry in entries]
    updates = [{k: v.double() for k, v in read_update(tmp_path / "memory", entry).items()} for entry in entries]
    start, end = ({k: v.double() for k, v in factors.items()} for factors in (Toy().state_dict(), journey.factors()))
    if "product" in name:
        for layer in ("q", "v"):
            a, b = f"{layer}.lora_A.w", f"{layer}.lora_B.w"
            found = start[b] @ start[a] + sum(u[f"{layer}.left"] @ u[f"{layer}.right"] for u in updates)
            torch.testing.assert_close(found, end[b] @ end[a], rtol=0, atol=1e-5)
    else:
        for factor, value in start.items():
            torch.testing.assert_close(value + sum(u[factor] for u in updates), end[factor], rtol=0, atol=1e-5)
