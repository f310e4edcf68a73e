"""The replay buffer: who enters, who leaves (docs/method.md, Replay)."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from lifealign.data.replay import ReplayBuffer, Reservoir
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError


def pairs(task: str, count: int) -> list[Pair]:
    return [Pair(f"{task}{i}", [1, i], [2, i], [3], f"ask {i}", "yes", "nö") for i in range(count)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(buffer: ReplayBuffer) -> list[str]:
    return [pair.id for pair in buffer.pairs]


@pytest.mark.parametrize(("count", "entering"), [(0, 0), (1, 0), (5, 1), (10, 2), (240, 48)])
def test_a_fifth_enters_each_once(count: int, entering: int) -> None:
    buffer = ReplayBuffer(3000, 0.2)
    buffer.add(pairs("a", count), seeded(0))
    assert len(set(ids(buffer))) == len(buffer.pairs) == entering
    assert set(ids(buffer)) <= {pair.id for pair in pairs("a", count)}


def test_every_pair_is_as_likely_to_enter() -> None:
    """2 of 10, 2,000 times: each is expected 400 times with variance 2000·0.2·0.8 = 320 and, since counts add up to
    4,000, correlation −1/9, so (9/10)·Σ (n − 400)²/320 is χ² with 9 degrees of freedom: above 27.9 once in 1,000.

    The released code, which takes the first 20 %, would score 16,200.
    """
    counts = dict.fromkeys((pair.id for pair in pairs("a", 10)), 0)
    for seed in range(2000):
        buffer = ReplayBuffer(100, 0.2)
        buffer.add(pairs("a", 10), seeded(seed))
        for id in ids(buffer):
            counts[id] += 1
    assert sum(counts.values()) == 4000
    assert 0.9 * sum((n - 400) ** 2 / 320 for n in counts.values()) < 27.9


def test_the_oldest_leave() -> None:
    """Room for 5, all enter: after 3 of a and 3 of b the one of a that came first is gone; 4 of c leave one of b."""
    buffer = ReplayBuffer(5, 1.0)
    buffer.add(pairs("a", 3), seeded(0))
    first = ids(buffer)
    buffer.add(pairs("b", 3), seeded(1))
    second = ids(buffer)
    assert second[:2] == first[1:]
    assert {id[0] for id in second[2:]} == {"b"}
    buffer.add(pairs("c", 4), seeded(2))
    assert ids(buffer)[0] == second[-1]
    assert sorted(ids(buffer)[1:]) == ["c0", "c1", "c2", "c3"]


def test_a_buffer_that_is_not_full_loses_nothing() -> None:
    buffer = ReplayBuffer(6, 1.0)
    for number, task in enumerate("abc"):
        buffer.add(pairs(task, 2), seeded(number))
    assert sorted(ids(buffer)) == ["a0", "a1", "b0", "b1", "c0", "c1"]


@pytest.mark.parametrize("size", [0, 1, 7, 24])
def test_size_bounds_the_buffer(size: int) -> None:
    buffer = ReplayBuffer(size, 0.5)
    for number, task in enumerate("abcd"):
        buffer.add(pairs(task, 20), seeded(number))
        assert len(buffer.pairs) == min(size, 10 * (number + 1))


def test_a_task_larger_than_the_buffer_enters_as_a_sample() -> None:
    """Which 3 of 30 stay depends on the draw and not on the place in the file."""
    stays = set()
    for seed in range(60):
        buffer = ReplayBuffer(3, 1.0)
        buffer.add(pairs("a", 30), seeded(seed))
        stays |= set(ids(buffer))
    assert len(stays) > 25  # each is missing with probability 0.9^60 = 0.002


def test_the_generator_alone_decides() -> None:
    drawn = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        buffer = ReplayBuffer(50, 0.2)
        buffer.add(pairs("a", 100), seeded(7))
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(ids(buffer))
    assert drawn[0] == drawn[1]
    other = ReplayBuffer(50, 0.2)
    other.add(pairs("a", 100), seeded(8))
    assert ids(other) != drawn[0]


def test_state_round_trip() -> None:
    """Through JSON, as a checkpoint stores it; both go on alike."""
    buffer, restored = ReplayBuffer(8, 0.4), ReplayBuffer(8, 0.4)
    buffer.add(pairs("a", 12), seeded(0))
    restored.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert restored.pairs == buffer.pairs
    for each in (buffer, restored):
        each.add(pairs("b", 15), seeded(1))
    assert restored.pairs == buffer.pairs
    assert len(buffer.pairs) == 8


def test_a_reservoir_holds_every_pair_met_with_the_same_chance() -> None:
    """3 of 12 pairs in tasks of 2, 6 and 4, 2,000 times: each is expected 500 times with variance 2000·¼·¾ = 375 and
    correlation −1/11, so (11/12)·Σ (n − 500)²/375 is χ² with 11 degrees of freedom: above 31.3 once in 1,000.
    """
    counts = dict.fromkeys((pair.id for task, count in (("a", 2), ("b", 6), ("c", 4)) for pair in pairs(task, count)), 0)
    for seed in range(2000):
        buffer = Reservoir(3)
        for number, (task, count) in enumerate((("a", 2), ("b", 6), ("c", 4))):
            buffer.add(pairs(task, count), seeded(3 * seed + number))
        assert len(set(ids(buffer))) == 3
        for id in ids(buffer):
            counts[id] += 1
    assert 11 / 12 * sum((n - 500) ** 2 / 375 for n in counts.values()) < 31.3


def test_a_reservoir_goes_on_where_it_was_saved() -> None:
    buffer, restored = Reservoir(4), Reservoir(4)
    buffer.add(pairs("a", 9), seeded(0))
    restored.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    for each in (buffer, restored):
        each.add(pairs("b", 5), seeded(1))
    assert ids(restored) == ids(buffer)
    assert restored.seen == 14


@pytest.mark.parametrize("kind", [lambda size: ReplayBuffer(size, 1.0), Reservoir])
def test_a_buffer_that_has_become_smaller_holds_no_more_than_it_may(kind: Callable[[int], ReplayBuffer]) -> None:
    large, small = kind(8), kind(3)
    large.add(pairs("a", 20), seeded(0))
    small.load_state_dict(json.loads(json.dumps(large.state_dict())))
    assert len(small.pairs) == 3 and set(ids(small)) < set(ids(large))
    if isinstance(small, Reservoir):
        assert small.seen == 20
    else:
        assert ids(small) == ids(large)[-3:]  # the oldest leave


def test_a_reservoir_does_not_go_on_from_another_buffer() -> None:
    with pytest.raises(UserError, match=r"strategy\.buffer=reservoir: the run's buffer is another"):
        Reservoir(4).load_state_dict(ReplayBuffer(4, 0.2).state_dict())
    with pytest.raises(UserError, match=r"strategy\.buffer=uniform: the run's buffer is another"):
        ReplayBuffer(4, 0.2).load_state_dict(Reservoir(4).state_dict())


def test_a_reservoir_that_was_full_does_not_grow() -> None:
    small, partly = Reservoir(3), Reservoir(8)
    for buffer in (small, partly):
        buffer.add(pairs("a", 5), seeded(0))
    with pytest.raises(UserError, match=r"strategy\.buffer_size=4: the run's buffer was full at 3 pairs"):
        Reservoir(4).load_state_dict(small.state_dict())
    larger = Reservoir(9)
    larger.load_state_dict(partly.state_dict())
    assert ids(larger) == ids(partly)


def test_a_reservoir_without_room_holds_nothing() -> None:
    buffer = Reservoir(0)
    buffer.add(pairs("a", 5), seeded(0))
    assert ids(buffer) == []
