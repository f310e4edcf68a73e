"""``launch/memory.py``: the ledger of a finished run listed, shown, exported, and an adapter with less of a task."""

from __future__ import annotations

import csv
import hashlib
import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import Ended, compose_config, end_here, train_here

from lifealign.memory.bank import read_ledger, read_update
from lifealign.memory.contributions import cosines, summarise
from lifealign.memory.edit import edit, finished_adapters
from lifealign.memory_command import main
from lifealign.models.adapter import WEIGHTS, saved_name
from lifealign.rescore import Scorer
from lifealign.run import train

THREE = ("sequence.tasks=[instruct,hc3,safe_rlhf]", "evaluation.metrics=[preference_accuracy,chosen_nll]")
SPACES = {"factors": (), "product": ("strategy.space=product",), "bf16": ("strategy.memory_dtype=bfloat16",)}


LONGER = [pytest.param(name, marks=pytest.mark.slow) for name in SPACES if name != "factors"]


@pytest.fixture(scope="module", params=["factors", *LONGER])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through three tasks, in each space and dtype."""
    return train_here(tmp_path_factory.mktemp(request.param) / "run", *THREE, *SPACES[request.param])


def memory(*arguments: str | Path) -> Ended:
    return end_here(lambda: sys.exit(main(sys.argv[1:])), *map(str, arguments))


def digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def products(folder: Path) -> dict[str, torch.Tensor]:
    """B A of each layer of an adapter, float64."""
    held = {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}
    layers = [name.removesuffix(".lora_A.weight") for name in held if name.endswith(".lora_A.weight")]
    return {layer: held[f"{layer}.lora_B.weight"] @ held[f"{layer}.lora_A.weight"] for layer in layers}


def largest_difference(one: Path, other: Path) -> float:
    """Of the products of two adapters, relative to the largest entry of any."""
    a, b = products(one), products(other)
    return max((a[layer] - b[layer]).abs().max().item() for layer in a) / max(p.abs().max().item() for p in b.values())


def test_reverting_the_last_task_gives_the_adapter_before_it(run: Path, tmp_path: Path) -> None:
    before = digests(run)
    assert memory(run, "revert", "safe_rlhf", "--to", tmp_path / "without").code == 0
    tolerance = 1e-6 if "product" not in str(run) else 1e-4
    if "bf16" in str(run):  # updates are rounded before they join, so that the ledger adds up all the same
        assert {read_update(run / "memory", e)[n].dtype for e in read_ledger(run / "memory") for n in e["tensors"]} == {
            torch.bfloat16
        }
    assert largest_difference(tmp_path / "without", run / "tasks" / "02_hc3" / "adapter") < tolerance
    assert largest_difference(tmp_path / "without", run / "adapter") > 100 * tolerance
    assert digests(run) == before


def test_scaling_changes_nothing_but_the_tasks_own_part(run: Path, tmp_path: Path) -> None:
    """In the space of factors, to the last entry: W + (s - 1) times the updates of the tasks that are scaled."""
    assert memory(run, "scale", "hc3=0.5", "instruct=2", "--to", tmp_path / "scaled").code == 0
    said = json.loads((tmp_path / "scaled" / "edit.json").read_text())
    assert said["scaled"] == {"hc3": 0.5, "instruct": 2.0}
    assert [entry["factor"] for entry in said["entries"]] == [2.0, 2.0, 0.5, 0.5, 1.0, 1.0]
    if "product" in str(run):
        return
    whole, scaled = load_file(run / "adapter" / WEIGHTS), load_file(tmp_path / "scaled" / WEIGHTS)
    expected = {name: tensor.double() for name, tensor in whole.items()}
    for entry in read_ledger(run / "memory"):
        for name, update in read_update(run / "memory", entry).items():
            expected[saved_name(name)] += {"hc3": -0.5, "instruct": 1.0}.get(entry["task"], 0.0) * update.double()
    for name, tensor in scaled.items():
        assert tensor.dtype == whole[name].dtype
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-9)


def test_products_are_scaled_too(run: Path) -> None:
    """What is left is the nearest adapter of its rank to the product less what the ledger says; the rest of it is told."""
    if "product" not in str(run):
        pytest.skip("a matter of the space of products")
    edited = edit(run, {"hc3": 0.0})
    whole, held = products(run / "adapter"), edited.factors
    for layer, product in whole.items():
        updates = [read_update(run / "memory", e) for e in read_ledger(run / "memory") if e["task"] == "hc3"]
        wanted = product - sum(u[f"{layer}.left"].double() @ u[f"{layer}.right"].double() for u in updates)
        u, s, vt = torch.linalg.svd(wanted)
        rank = held[f"{layer}.lora_A.weight"].shape[0]
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        got = held[f"{layer}.lora_B.weight"].double() @ held[f"{layer}.lora_A.weight"].double()
        assert (got - best).norm() < 1e-5 * best.norm()
    assert 0 < edited.truncation_error < 1


def test_an_edit_by_one_changes_nothing(run: Path) -> None:
    assert {name: t.tolist() for name, t in edit(run, {"hc3": 1.0}).factors.items()} == {
        name: t.tolist() for name, t in load_file(run / "adapter" / WEIGHTS).items()
    }


def test_list_has_a_line_a_stage(run: Path) -> None:
    ended = memory(run, "list")
    assert ended.code == 0
    lines = ended.out.splitlines()
    entries = read_ledger(run / "memory")
    assert len(lines) == 1 + len(entries) == 7
    for line, entry in zip(lines[1:], entries, strict=True):
        assert line.split()[:2] == [entry["task"], entry["stage"]]
        assert line.split()[-1] == entry["hashes"]["update"][:12]
        norm, before, rank, kept, _, conflict, _ = line.split()[4:-1]
        factors = entry["factors"]
        energies = [factor["update_norm"] ** 2 for factor in factors]
        left = [energy * factor["kept_energy"] for energy, factor in zip(energies, factors, strict=True)]
        shared = sum(energy * factor["history_share"] for energy, factor in zip(left, factors, strict=True))
        assert float(norm) ** 2 == pytest.approx(sum(factor["refined_norm"] ** 2 for factor in factors), rel=2e-3)
        assert float(before) ** 2 == pytest.approx(sum(energies), rel=2e-3)
        assert float(rank) == pytest.approx(sum(factor["kept_rank"] for factor in factors) / len(factors), abs=0.06)
        assert float(kept) == pytest.approx(100 * sum(left) / sum(energies), abs=0.06)
        assert float(conflict) == pytest.approx(100 * shared / sum(left), abs=0.06)


def test_show_has_layers_and_pictures(run: Path, tmp_path: Path) -> None:
    ended = memory(run, "show", "hc3", "--to", tmp_path)
    assert ended.code == 0
    assert "model.layers.0.self_attn.q_proj" in ended.out
    assert "hc3 +1.000" in ended.out
    hashes = [digest for e in read_ledger(run / "memory") if e["task"] == "hc3" for digest in e["hashes"].values()]
    assert len(hashes) == 8 and all(digest[:12] in ended.out for digest in hashes)
    for name in ("memory_conflict.png", "memory_spectrum_hc3.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_cosines_are_those_of_whole_updates(run: Path) -> None:
    """Against the flattened sums of what each task added, formed as dense matrices."""
    entries, tasks = read_ledger(run / "memory"), ["instruct", "hc3", "safe_rlhf"]
    vectors = {task: 0.0 for task in tasks}
    for entry in entries:
        update = {name: tensor.double() for name, tensor in read_update(run / "memory", entry).items()}
        if entry["space"] == "product":
            layers = sorted({name.rpartition(".")[0] for name in update})
            parts = [(update[f"{layer}.left"] @ update[f"{layer}.right"]).flatten() for layer in layers]
        else:
            parts = [update[name].flatten() for name in sorted(update)]
        vectors[entry["task"]] = vectors[entry["task"]] + torch.cat(parts)
    stacked = torch.nn.functional.normalize(torch.stack([torch.as_tensor(vectors[task]) for task in tasks]))
    torch.testing.assert_close(cosines(run / "memory", entries), stacked @ stacked.T, rtol=0, atol=1e-6)


def test_export_has_a_row_a_factor(run: Path, tmp_path: Path) -> None:
    assert memory(run, "export", "--to", tmp_path / "ledger.csv").code == 0
    rows = list(csv.DictReader((tmp_path / "ledger.csv").open(encoding="utf-8")))
    entries = read_ledger(run / "memory")
    assert len(rows) == sum(len(entry["factors"]) for entry in entries)
    first = entries[0]["factors"][0]
    assert float(rows[0]["refined_norm"]) == first["refined_norm"]
    assert rows[0]["update_sha256"] == entries[0]["hashes"]["update"]
    assert memory(run, "export").out.count("\n") == len(rows) + 1


def test_every_entry_says_what_made_it(run: Path) -> None:
    entries = read_ledger(run / "memory")
    configuration = {entry["hashes"]["configuration"] for entry in entries}
    assert len(configuration) == 1
    assert len({entry["hashes"]["data"] for entry in entries}) == 3
    assert len({entry["hashes"]["update"] for entry in entries}) == 6
    assert all(len(value) == 64 for entry in entries for value in entry["hashes"].values())


def test_scores_of_an_edit_are_those_of_the_adapter_it_made(run: Path, tmp_path: Path) -> None:
    """Without the last task: what the run scored before it, on the tasks of then."""
    ended = memory(run, "revert", "safe_rlhf", "--to", tmp_path / "without", "--score")
    assert ended.code == 0
    scored = json.loads((tmp_path / "without" / "scores.json").read_text())["scores"]
    before = json.loads((run / "tasks" / "02_hc3" / "scores.json").read_text())["scores"]
    for task in ("instruct", "hc3"):
        assert scored[task]["chosen_nll"] == pytest.approx(before[task]["chosen_nll"], abs=1e-4)
    assert list(scored) == ["instruct", "hc3", "safe_rlhf"]
    assert ended.out.count("→") == 3 * 2


def test_summary_by_hand() -> None:
    """Energies 9 and 16: 0.9 and 0.5 of them kept, 8.1 + 8 of 25; of that a tenth and a half in the span: 4.81 of 16.1."""
    records = [
        {"update_norm": 3.0, "refined_norm": 3.0, "kept_rank": 1, "kept_energy": 0.9, "history_share": 0.1},
        {"update_norm": 4.0, "refined_norm": 4.0, "kept_rank": 4, "kept_energy": 0.5, "history_share": 0.5},
    ]
    summary = summarise(records)
    assert (summary.norm, summary.update_norm, summary.kept_rank) == pytest.approx((5.0, 5.0, 2.5))
    assert summary.kept_energy == pytest.approx(16.1 / 25)
    assert summary.history_share == pytest.approx(4.81 / 16.1)
    raw = summarise([{"update_norm": 3.0, "refined_norm": 3.0}])
    assert (raw.norm, raw.kept_rank, raw.history_share) == (3.0, None, None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first stage is not consolidated."""
    return train_here(
        tmp_path_factory.mktemp("plain") / "run",
        "strategy.consolidate_stages=[preference]",
        "evaluation.metrics=[chosen_nll]",
    )


def test_a_stage_that_is_not_consolidated_is_in_the_sum(plain: Path, tmp_path: Path) -> None:
    assert [entry["consolidated"] for entry in read_ledger(plain / "memory")] == [False, True, False, True]
    assert memory(plain, "revert", "hc3", "--to", tmp_path / "without").code == 0
    assert largest_difference(tmp_path / "without", plain / "tasks" / "01_instruct" / "adapter") < 1e-5
    assert "–" in memory(plain, "list").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "hc4"), "show hc4: the ledger names no such task; did you mean 'hc3'?"),
        (("revert", "nothing", "--to", "x"), "nothing: no finished task of this name"),
        (("scale", "hc3=much", "--to", "x"), "scale hc3=much: give a task and a number, such as hc3=0.5"),
        (("scale", "hc3", "--to", "x"), "scale hc3: give a task and a number, such as hc3=0.5"),
        (("scale", "hc3=nan", "--to", "x"), "hc3=nan: give a number, such as 0.5"),
        (("scale", "hc3=1e60", "--to", "x"), "hc3=1e+60: too large for float32"),
        (("scale", "hc3=0.5", "hc3=2", "--to", "x"), "a task is named twice; give each once"),
        (("export", "--to", "/proc/nowhere/x.csv"), "No such file or directory"),
        (("revert", "hc3"), "--to"),
        (("forget", "hc3"), "invalid choice"),
        ((), "ACTION"),
    ],
)
def test_mistakes_are_told_in_one_line(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = memory(plain, *arguments)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert said in ended.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_or_has_no_memory(tmp_path: Path, plain: Path) -> None:
    assert "holds no run" in memory(tmp_path / "nowhere", "list").err
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    shutil.rmtree(copy / "memory")
    assert "there is no long-term memory" in memory(copy, "list").err


def test_an_edit_of_a_task_that_is_not_finished(tmp_path: Path, plain: Path) -> None:
    """Interrupted in its second task, a run has entries that its adapter does not hold."""
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    shutil.rmtree(copy / "tasks" / "02_hc3")
    assert "hc3: no finished task" in memory(copy, "revert", "hc3", "--to", tmp_path / "x").err
    assert memory(copy, "revert", "instruct", "--to", tmp_path / "x").code == 0
    said = json.loads((tmp_path / "x" / "edit.json").read_text())
    assert [entry["task"] for entry in said["entries"]] == ["instruct", "instruct"]


def test_damaged_memory_is_never_used(tmp_path: Path, plain: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    shard = next((copy / "memory" / "003_hc3_preference").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ended = memory(copy, "revert", "hc3", "--to", tmp_path / "x")
    assert ended.code == 2
    assert "is not what was written" in ended.err
    assert not (tmp_path / "x").exists()


def test_the_hundredth_task_comes_after_the_eleventh(tmp_path: Path) -> None:
    for number in (1, 11, 99, 100, 101):
        (tmp_path / "tasks" / f"{number:02d}_t{number}" / "adapter").mkdir(parents=True)
    assert [adapter.parent.name for adapter in finished_adapters(tmp_path)] == [
        "01_t1",
        "11_t11",
        "99_t99",
        "100_t100",
        "101_t101",
    ]


def test_an_edit_starts_from_the_last_finished_task(tmp_path: Path, plain: Path) -> None:
    """A run that died between writing a task's adapter and its own leaves an older one at its top."""
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    shutil.copytree(copy / "tasks" / "01_instruct" / "adapter", copy / "adapter", dirs_exist_ok=True)
    assert memory(copy, "revert", "hc3", "--to", tmp_path / "x").code == 0
    assert largest_difference(tmp_path / "x", copy / "tasks" / "01_instruct" / "adapter") < 1e-5


@pytest.mark.parametrize("action", ["show", "revert"])
def test_a_missing_shard_is_told(tmp_path: Path, plain: Path, action: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    next((copy / "memory" / "003_hc3_preference").glob("*.safetensors")).unlink()
    ended = memory(copy, action, "hc3", "--to", tmp_path / "x")
    assert ended.code == 2
    assert "is missing" in ended.err


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "x").mkdir()
    assert "exists already" in memory(plain, "revert", "hc3", "--to", tmp_path / "x").err


def test_an_edited_adapter_opens_like_any_other(tmp_path: Path, plain: Path) -> None:
    """Loaded as it is, it says something else than the run's own, which says what it said then."""
    assert memory(plain, "scale", "hc3=0.5", "--to", tmp_path / "x").code == 0
    was = json.loads((plain / "scores.json").read_text())["metrics"]["chosen_nll"]["matrix"][-1][0]
    scorer = Scorer(plain)
    for adapter, same in ((tmp_path / "x", False), (finished_adapters(plain)[-1], True)):
        (_, evaluation), *_ = scorer.score(adapter, scorer.tasks[:1])
        assert (abs(evaluation.scores["chosen_nll"] - was) < 1e-4) is same


def test_scores_that_the_run_does_not_have_yet_are_asked_for_before_the_work(tmp_path: Path, plain: Path) -> None:
    """As where a run was killed between a task's adapter and its scores."""
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    newest = finished_adapters(copy)[-1].parent
    matrix = json.loads((copy / "scores.json").read_text())
    for metric in matrix["metrics"].values():
        metric["matrix"].pop()
    (copy / "scores.json").write_text(json.dumps(matrix))
    for done in ("all but the run's own", "the adapter alone"):
        ended = memory(copy, "revert", "instruct", "--to", tmp_path / "x", "--score")
        assert (ended.code, ended.err.count("\n")) == (2, 1), done
        assert f"{newest}: the run was interrupted before this task was scored" in ended.err
        assert not (tmp_path / "x").exists()
        (newest / "scores.json").unlink(missing_ok=True)
    assert memory(copy, "revert", "instruct", "--to", tmp_path / "x").code == 0


def test_what_lies_beside_the_new_folder_is_left_alone(tmp_path: Path, plain: Path) -> None:
    """A run may have such a name."""
    for name in ("main.retired", "main.partial"):
        shutil.copytree(plain, tmp_path / name)
    for name in ("main.retired", "main.partial"):
        assert memory(tmp_path / name, "revert", "hc3", "--to", tmp_path / "main").code == 0
        assert (tmp_path / name / "memory" / "ledger.json").exists()
        assert (tmp_path / "main").stat().st_mode == (tmp_path / name).stat().st_mode
        shutil.rmtree(tmp_path / "main")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["main.partial", "main.retired"]


def test_what_does_not_fit_on_the_disk_is_told_and_leaves_nothing(tmp_path: Path, plain: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        ended = memory(plain, "revert", "hc3", "--to", tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (ended.code, ended.err) == (2, f"error: --to {tmp_path / 'x'}: cannot be written (File too large)\n")
    assert list(tmp_path.iterdir()) == []


def test_several_ranks_are_refused(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it with python" in memory(plain, "revert", "hc3", "--to", tmp_path / "x").err


@pytest.mark.slow
def test_a_task_taken_out_of_the_default_run_is_forgotten_and_the_others_hold(tmp_path: Path) -> None:
    """The figures of docs/memory.md, with room for other processors: hc3 falls by 48 points, the others by 2 on average."""
    run = tmp_path / "run"
    train(compose_config("+sequence=six_domains", f"run.dir={run}", "tracking.mode=disabled"))
    matrix = json.loads((run / "scores.json").read_text())["metrics"]["preference_accuracy"]["matrix"]
    tasks = json.loads((run / "scores.json").read_text())["tasks"]
    assert memory(run, "revert", "hc3", "--to", tmp_path / "without", "--score").code == 0
    scored = json.loads((tmp_path / "without" / "scores.json").read_text())["scores"]
    change = {task: scored[task]["preference_accuracy"] - was for task, was in zip(tasks, matrix[-1], strict=True)}
    assert change.pop("hc3") < -30
    assert sum(change.values()) / len(change) > -5
