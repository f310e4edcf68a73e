"""Preference distillation: the loss by hand, from log-probabilities of hand-made pairs, and in a run of two tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import compose_config, train_here

from lifealign.config import build
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.models.scoring import ReferenceLogps, pair_key
from lifealign.objectives import DPO, SimPO
from lifealign.stages import PreferenceStage, SupervisedStage
from lifealign.strategies import Context, Run, Seen, State
from lifealign.strategies.lwf import LearningWithoutForgetting, PairTable, distillation, reward_margins

LN2, LN3 = math.log(2), math.log(3)
PAIRS = [Pair("a", [1, 2], [3, 4, 5], [6], "", "", ""), Pair("b", [1], [7], [8, 9], "", "", "")]


def hand_made(reference: list[list[float]], beta: float) -> Run:
    """A run whose stages know the reference log-probabilities of PAIRS."""
    held = ReferenceLogps()
    keys = torch.stack([torch.frombuffer(bytearray(pair_key(pair)), dtype=torch.uint8) for pair in PAIRS])
    held.load_state_dict({"keys": keys, "logps": torch.tensor(reference)})
    stages: dict[str, Any] = {"sft": SupervisedStage(), "preference": PreferenceStage(DPO(beta=beta), held)}
    return Run(None, Path(), 0, "", None, stages, 8)  # type: ignore[arg-type]


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]


@pytest.mark.parametrize(
    ("margin", "old", "temperature", "loss", "slope"),
    [
        # sigma(ln 3) = 3/4. Undecided against 3/4: ln 2 whatever the target. Slope T (1/2 - 3/4).
        (0.0, LN3, 1.0, LN2, -1 / 4),
        (0.0, 2 * LN3, 2.0, 4 * LN2, -1 / 2),
        # 3/4 against undecided: -(ln 3/4 + ln 1/4) / 2, times T^2. Slope T (3/4 - 1/2).
        (2 * LN3, 0.0, 2.0, -2 * math.log(3 / 16), 1 / 2),
        # The same preference: its entropy, and no slope.
        (-LN3, -LN3, 1.0, -(math.log(1 / 4) / 4 + 3 * math.log(3 / 4) / 4), 0.0),
    ],
)
def test_distillation_by_hand(margin: float, old: float, temperature: float, loss: float, slope: float) -> None:
    r = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    found = distillation(r, torch.tensor([old], dtype=torch.float64), temperature)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert r.grad is not None
    assert r.grad.item() == pytest.approx(slope, abs=1e-12)


def test_a_pair_is_held_to_the_old_margin() -> None:
    """beta = 1/2. Pair a: old margin ((-1 - -3) - (-4 - -4)) / 2 = 1, new ((-1 - -3) - (-2 - -4)) / 2 = 0.
    Pair b: old margin ((-2 - -2) - (-1 - -5)) / 2 = -2, new ((0 - -2) - (-5 - -5)) / 2 = 1.
    """
    run = hand_made([[-3.0, -4.0], [-2.0, -5.0]], beta=0.5)
    strategy = LearningWithoutForgetting(strength=3.0, temperature=1.0)
    strategy.before = PairTable(PAIRS, torch.tensor([[-1.0, -4.0], [-2.0, -1.0]]))
    logps = torch.tensor([-1.0, -2.0, 0.0, -5.0], requires_grad=True)
    seen = Seen(PAIRS, None, logps, torch.zeros(2))  # type: ignore[arg-type]
    task: Any = SimpleNamespace(train=PAIRS)
    (terms,) = strategy.pair_terms(Context(run, task, 1, "preference"), seen).values()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    second = -sigmoid(-2) * math.log(sigmoid(1)) - sigmoid(2) * math.log(sigmoid(-1))
    assert terms.tolist() == pytest.approx([3 * LN2, 3 * second], rel=1e-6)
    terms.sum().backward()
    # d/dr = sigma(r) - sigma(r_old), and dr = beta d(chosen) - beta d(rejected).
    slopes = [3 * 0.5 * (0.5 - sigmoid(1)), 3 * 0.5 * (sigmoid(1) - sigmoid(-2))]
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([slopes[0], -slopes[0], slopes[1], -slopes[1]], rel=1e-6)
    assert strategy.pair_terms(Context(run, task, 1, "sft"), seen) == {}
    assert strategy.pair_terms(Context(run, task, 0, "preference"), seen) == {}


def test_margins_are_those_of_the_objective() -> None:
    """SimPO knows no reference and divides by lengths; beta = 2. Pair a: 2 (-3 / 3 - -4 / 1) = 6; b: 2 (-2 / 1 - -1 / 2)."""
    run = hand_made([[-3.0, -4.0], [-2.0, -5.0]], beta=0.5)
    run.stages["preference"].objective = SimPO()  # type: ignore[attr-defined]
    logps = torch.tensor([[-3.0, -4.0], [-2.0, -1.0]], requires_grad=True)
    margins = reward_margins(run, PAIRS, logps)
    assert margins.tolist() == [6.0, -3.0]
    margins.sum().backward()
    assert logps.grad is not None and logps.grad.tolist() == [pytest.approx([2 / 3, -2.0]), pytest.approx([2.0, -1.0])]


def test_a_table_finds_rows_by_token_ids_and_survives_a_checkpoint() -> None:
    values = torch.tensor([[-1.25, -4.0], [-2.0, 0.1]])
    table = PairTable(PAIRS, values)
    again = PairTable()
    again.load_state_dict(table.state_dict())
    assert again.of([PAIRS[1], PAIRS[0], PAIRS[1]]).equal(values[[1, 0, 1]])
    again.check(PAIRS)
    other = [Pair("a", [1, 2], [3, 4, 5], [7], "", "", "")]
    with pytest.raises(KeyError):
        again.of(other)
    with pytest.raises(UserError, match="rows are not those that it began with"):
        again.check([*PAIRS, *other])
    again.load_state_dict(State(tensors=PairTable().state_dict()).tensors)
    with pytest.raises(KeyError):
        again.of(PAIRS[:1])


def test_a_task_begins_where_distillation_has_no_slope(tmp_path: Path) -> None:
    """Without an SFT stage the second task starts from the old policy itself, so its first step is that of seqft: the loss
    is at its least, and its gradient 0. A strong distillation then keeps margins from growing as those of seqft do: DPO pulls
    with at most 1/2 against strength / 4 times the distance.
    """
    small = ("objective=dpo", "sft.epochs=0", "preference.epochs=4", "evaluation.metrics=[reward_margin]", "data.max_eval=2")
    plain = train_here(tmp_path / "plain", "strategy=seqft", *small)
    held = train_here(tmp_path / "held", "strategy=lwf", "strategy.strength=3000", *small)
    before, after = rows(plain), rows(held)
    first_task = [row["grad_norm"] for row in before if row["task_number"] == 0]
    assert [row["grad_norm"] for row in after if row["task_number"] == 0] == first_task
    assert all(("lwf" in row) == (row["task_number"] == 1) for row in after)
    start = len(first_task)
    assert after[start]["grad_norm"] == pytest.approx(before[start]["grad_norm"], rel=2e-2)
    assert after[start]["loss"] - after[start]["lwf"] == pytest.approx(before[start]["loss"], rel=1e-5)
    moved, kept = (rows[-1]["margin"] - rows[start]["margin"] for rows in (before, after))
    assert abs(kept) < abs(moved) / 2


@pytest.mark.parametrize("option", ["strength=-1", "strength=inf", "temperature=0", "temperature=inf"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"strategy.{option.split('=')[0]}="):
        build(compose_config("+sequence=six_domains", "strategy=lwf", f"strategy.{option}"))
