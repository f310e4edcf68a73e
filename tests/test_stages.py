"""Batch arithmetic, what each stage's loss is a mean over, and the order of batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.models.scoring import ReferenceLogps, pair_key
from lifealign.objectives import DPO, FPO
from lifealign.stages import PreferenceStage, StageOptions, SupervisedStage
from lifealign.trainer import plan_batches

LN2, LN3 = math.log(2), math.log(3)
PAIRS = [
    Pair("a", [1, 2], [3, 4, 5], [6], "", "", ""),
    Pair("b", [1], [7], [8, 9], "", "", ""),
    Pair("c", [1, 2, 3], [4, 4], [5, 5, 5, 5], "", "", ""),
]


@pytest.mark.parametrize(
    ("options", "ranks", "accumulation", "global_batch"),
    [
        ({"micro_batch_size": 4}, 1, 1, 4),
        ({"micro_batch_size": 4}, 3, 1, 12),
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 5}, 2, 5, 40),
        ({"micro_batch_size": 4, "batch_size": 32}, 1, 8, 32),
        ({"micro_batch_size": 4, "batch_size": 32}, 2, 4, 32),
        ({"micro_batch_size": 4, "batch_size": 32}, 8, 1, 32),
        ({"micro_batch_size": 4, "batch_size": 32, "gradient_accumulation_steps": 4}, 2, 4, 32),
    ],
)
def test_batch_sizes(options: dict[str, int], ranks: int, accumulation: int, global_batch: int) -> None:
    stage = StageOptions(**options)
    assert stage.accumulation("sft", ranks) == accumulation
    assert stage.global_batch("sft", ranks) == global_batch


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"micro_batch_size": 4, "batch_size": 30}, 1),
        ({"micro_batch_size": 4, "batch_size": 32}, 3),
        ({"micro_batch_size": 8, "batch_size": 4}, 1),
        ({"micro_batch_size": 4, "batch_size": 32, "gradient_accumulation_steps": 4}, 1),
        ({"micro_batch_size": 4, "batch_size": 32, "gradient_accumulation_steps": 16}, 1),
    ],
)
def test_batch_sizes_that_do_not_divide(options: dict[str, int], ranks: int) -> None:
    stage = StageOptions(**options)
    for ask in (stage.accumulation, stage.global_batch, lambda name, ranks: stage.steps(10, name, ranks)):
        with pytest.raises(UserError, match=rf"preference\.batch_size={options['batch_size']}") as caught:
            ask("preference", ranks)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "ranks"), [((4, 30, None), 1), ((4, 32, 4), 1), ((8, 4, None), 1), ((4, 32, None), 3)])
def test_the_batch_size_that_the_message_proposes_is_right(options: tuple[int, int, int | None], ranks: int) -> None:
    micro, batch, accumulation = options
    with pytest.raises(UserError) as caught:
        StageOptions(micro_batch_size=micro, batch_size=batch, gradient_accumulation_steps=accumulation).accumulation(
            "sft", ranks
        )
    proposed = int(str(caught.value).split("use a batch_size of ")[1].split(",")[0])
    repaired = StageOptions(micro_batch_size=micro, batch_size=proposed, gradient_accumulation_steps=accumulation)
    assert repaired.global_batch("sft", ranks) == proposed


@pytest.mark.parametrize(
    ("pairs", "epochs", "ranks", "steps"), [(16, 3, 1, 6), (17, 3, 1, 9), (17, 3, 2, 6), (1, 1, 4, 1), (9, 0, 1, 0)]
)
def test_steps(pairs: int, epochs: int, ranks: int, steps: int) -> None:
    """Global batch 8 × ranks; what is left over at the end of an epoch is a step of its own: 17 pairs make 3."""
    assert StageOptions(epochs=epochs, micro_batch_size=8).steps(pairs, "sft", ranks) == steps


def test_the_defaults_and_the_limits_are_in_range() -> None:
    StageOptions().check("sft")
    StageOptions(epochs=0, lr=0.0, micro_batch_size=1, batch_size=1, warmup_share=1.0, max_grad_norm=0.0).check("sft")


@pytest.mark.parametrize("key", ["micro_batch_size", "gradient_accumulation_steps", "batch_size"])
def test_sizes_below_one(key: str) -> None:
    with pytest.raises(UserError, match=rf"sft\.{key}=0"):
        StageOptions(**{key: 0}).check("sft")


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1},
        {"lr": -1e-4},
        {"weight_decay": -0.1},
        {"warmup_share": 1.1},
        {"warmup_share": -0.1},
        {"max_grad_norm": -1.0},
    ],
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    (key,) = options
    with pytest.raises(UserError, match=rf"preference\.{key}="):
        StageOptions(**options).check("preference")  # type: ignore[arg-type]


def test_supervised_stage_by_hand() -> None:
    """The loss is a sum of −log p over target tokens, to be divided by their number: (4 + 2 + 3)/(3 + 1 + 2) = 1.5.

    The mean of the pairs' own means, (4/3 + 2 + 3/2)/3 = 1.61, would depend on how a batch is split.
    """
    stage = SupervisedStage()
    row = stage.row(PAIRS[0])
    assert (list(row.prompt), [list(r) for r in row.responses]) == ([1, 2], [[3, 4, 5]])
    logps = torch.tensor([-4.0, -2.0, -3.0], requires_grad=True)
    losses, figures = stage.outcome(logps, PAIRS)
    loss, count = losses.sum(), sum(stage.size(pair) for pair in PAIRS)
    assert losses.tolist() == [4.0, 2.0, 3.0]
    assert (loss.item() / count, count, figures) == (1.5, 6, {})
    loss.backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [-1.0, -1.0, -1.0]


def reference(logps: Sequence[Sequence[float]]) -> ReferenceLogps:
    known = ReferenceLogps()
    keys = torch.tensor([list(pair_key(pair)) for pair in PAIRS], dtype=torch.uint8)
    known.load_state_dict({"keys": keys, "logps": torch.tensor(logps)})
    return known


REFERENCE = ((-10.0, -12.0), (-20.0, -7.0), (-3.0, -4.0))


def test_preference_stage_by_hand() -> None:
    """β = 0.5, τ = 0.8, γ = 2; log-ratios (0, 0), (4·ln 3, 0), (0, 2·ln 3), so rewards (0, 0), (2·ln 3, 0), (0, ln 3).

    r = 0: w = 1/4, L = ln 2/4, and no win. r = ln 9: p = 0.9 > τ, gated. r = −ln 3: p = 1/4, w = 9/16, L = 9/8·ln 2.
    The loss is the sum, 11/8·ln 2, over 3 pairs.
    """
    stage = PreferenceStage(FPO(beta=0.5, confidence_threshold=0.8), reference(REFERENCE))
    row = stage.row(PAIRS[1])
    assert (list(row.prompt), [list(r) for r in row.responses]) == ([1], [[7], [8, 9]])
    logps = torch.tensor([-10.0, -12.0, -20 + 4 * LN3, -7.0, -3.0, -4 + 2 * LN3], requires_grad=True)
    losses, figures = stage.outcome(logps, PAIRS)
    loss = losses.sum()
    assert loss.item() == pytest.approx(11 / 8 * LN2, abs=1e-5)
    assert sum(stage.size(pair) for pair in PAIRS) == 3
    expected = {
        "accuracy": [0, 1, 0],
        "margin": [0, 2 * LN3, -LN3],
        "chosen_reward": [0, 2 * LN3, 0],
        "rejected_reward": [0, 0, LN3],
        "focal_weight": [1 / 4, 0, 9 / 16],
        "gated_share": [0, 1, 0],
    }
    assert figures.keys() == expected.keys()
    for name, values in expected.items():
        assert not figures[name].requires_grad
        assert figures[name].tolist() == pytest.approx(values, abs=1e-5), name
    loss.backward()
    assert logps.grad is not None
    assert logps.grad[2:4].tolist() == [0.0, 0.0]
    slope = 0.5 * (-0.125 - 0.25 * LN2)
    assert logps.grad[:2].tolist() == pytest.approx([slope, -slope], abs=1e-5)


def test_the_reference_follows_the_pairs() -> None:
    """Log-probabilities are those of the pairs given, in their order: an untouched policy has loss ln 2 a pair."""
    stage = PreferenceStage(DPO(), reference(REFERENCE))
    logps = torch.tensor([*REFERENCE[2], *REFERENCE[0]])
    losses, figures = stage.outcome(logps, [PAIRS[2], PAIRS[0]])
    assert losses.tolist() == pytest.approx([LN2, LN2], abs=1e-6)
    assert figures["margin"].tolist() == [0.0, 0.0]


def test_a_confident_pair_is_not_a_gated_one() -> None:
    """τ = 1 gates nothing. At r = 60 the weight e^−120 is below float32, yet nothing has gated the pair."""
    stage = PreferenceStage(FPO(beta=1.0), reference(REFERENCE))
    _, figures = stage.outcome(torch.tensor([50.0, -12.0]), PAIRS[:1])
    assert figures["margin"].tolist() == [60.0]
    assert figures["gated_share"].tolist() == [0.0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rows", "batch_size", "epochs"), [(1, 4, 2), (10, 3, 3), (64, 4, 2), (203, 5, 2), (7, 100, 1)])
def test_every_row_once_an_epoch(rows: int, batch_size: int, epochs: int) -> None:
    """⌈rows/batch⌉ batches an epoch, all full but one."""
    batches = plan_batches([i * 7 % 31 for i in range(rows)], batch_size, epochs, seeded(0))
    per_epoch = math.ceil(rows / batch_size)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        own = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for batch in own for i in batch) == list(range(rows))
        assert sorted((len(batch) for batch in own), reverse=True)[:-1] == [batch_size] * (per_epoch - 1)


def test_no_epochs_no_batches() -> None:
    assert plan_batches([3, 4], 1, 0, seeded(0)) == []
    assert plan_batches([], 4, 2, seeded(0)) == []


def test_the_seed_alone_decides_the_order() -> None:
    lengths = [i % 13 for i in range(100)]
    plans = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        plans.append(plan_batches(lengths, 8, 3, seeded(5)))
        assert torch.equal(torch.get_rng_state(), before)
    assert plans[0] == plans[1]
    assert plan_batches(lengths, 8, 3, seeded(6)) != plans[0]
    assert plans[0][:13] != plans[0][13:26]  # epochs differ


def test_batches_hold_rows_of_like_length() -> None:
    """Of 128 rows with lengths 0 to 127, batches of 8 cut from one sorted stretch of 16 batches span exactly 7 each."""
    batches = plan_batches(list(range(128)), 8, 1, seeded(0))
    assert [max(batch) - min(batch) for batch in batches] == [7] * 16
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_rows_of_equal_length_are_shuffled() -> None:
    """Nothing but chance decides which rows share a batch: each epoch draws anew."""
    batches = plan_batches([5] * 40, 8, 2, seeded(0))
    assert {frozenset(b) for b in batches[:5]} != {frozenset(b) for b in batches[5:]}
    assert batches[0] != sorted(batches[0])
