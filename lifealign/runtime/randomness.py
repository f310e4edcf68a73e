"""The state of the random number generators of every rank, which dropout draws from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lifealign.runtime import distributed


def read_rng() -> dict[str, torch.Tensor]:
    """States by ``RANK/cpu`` and ``RANK/cuda``, of all ranks on every rank."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    states = enumerate(distributed.gather_objects(own))
    return {f"{rank}/{kind}": state for rank, of_rank in states for kind, state in of_rank.items()}


def write_rng(states: Mapping[str, torch.Tensor]) -> None:
    """Take up this rank's own. With another number of ranks each sees other rows, and draws as the stage's start seeded it."""
    if len({key.split("/")[0] for key in states}) != distributed.world_size():
        return
    torch.set_rng_state(states[f"{distributed.rank()}/cpu"])
    if torch.cuda.is_available() and f"{distributed.rank()}/cuda" in states:
        torch.cuda.set_rng_state(states[f"{distributed.rank()}/cuda"])
