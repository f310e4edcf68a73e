"""Preference distillation without replay, in the style of Learning without Forgetting (Li & Hoiem, 2016, arXiv 1606.09282)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.models.scoring import pair_key
from lifealign.registry import register
from lifealign.stages import PreferenceStage
from lifealign.strategies.base import Context, Run, Seen, State, Strategy

OUTSIDE_AN_ENGINE = "it runs the policy between stages, where nothing gathers partitioned weights"
"""Why a strategy that asks the policy before a task needs whole parameters."""


class PairTable:
    """A row of numbers for each pair, found by its token ids; on the CPU."""

    def __init__(self, pairs: Sequence[Pair] = (), rows: Sequence[torch.Tensor] | torch.Tensor = ()) -> None:
        self._rows = {pair_key(pair): row for pair, row in zip(pairs, rows, strict=True)}

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raises UserError where a pair has no row: the rows of its task were changed within the task."""
        if any(pair_key(pair) not in self._rows for pair in pairs):
            raise UserError(
                "the task's rows are not those that it began with, of which alone the policy before it was asked; give it "
                "those until it is done, or start over with resume=never"
            )

    def of(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """(pairs, numbers a row). Raises KeyError for a pair that has none."""
        return torch.stack([self._rows[pair_key(pair)] for pair in pairs])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``keys``, (pairs, 32) uint8, and ``rows``; nothing where the table is empty."""
        if not self._rows:
            return {}
        keys = np.frombuffer(b"".join(self._rows), dtype=np.uint8).reshape(-1, 32)
        return {"keys": torch.from_numpy(keys.copy()), "rows": torch.stack(list(self._rows.values()))}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self._rows = {}
        if state:
            self._rows = dict(zip((key.tobytes() for key in state["keys"].numpy()), state["rows"], strict=True))


def reward_margins(run: Run, pairs: Sequence[Pair], logps: torch.Tensor) -> torch.Tensor:
    """(pairs,) implicit reward margin r of a policy, the objective's own; differentiable in its log-probabilities.

    Args:
        pairs: ones that the run has met in the preference stage, so that their reference is known.
        logps: (pairs, 2) log-probabilities of chosen and rejected under the policy.
    """
    stage = run.stages["preference"]
    assert isinstance(stage, PreferenceStage)
    chosen, rejected = stage.objective.rewards(logps, *stage.known(pairs, logps.device))
    return chosen - rejected


def distillation(margins: torch.Tensor, old_margins: torch.Tensor, temperature: float) -> torch.Tensor:
    """(pairs,) T^2 times the cross-entropy of sigma(r_old / T) against sigma(r / T), differentiable in ``margins``.

    A preference has two outcomes, so this is eq. 2 of the paper for two classes whose logits differ by r: raising
    probabilities to 1/T (eq. 3) is dividing r by T. The gradient in r is T (sigma(r/T) - sigma(r_old/T)); T^2 keeps it of
    one size whatever T is (Hinton et al., 2015).
    """
    targets = torch.sigmoid(old_margins / temperature)
    return temperature**2 * binary_cross_entropy_with_logits(margins / temperature, targets, reduction="none")


@register("strategy", "lwf")
class LearningWithoutForgetting(Strategy):
    """In the preference stage the policy is also to prefer what the policy before the task preferred, on the task's own pairs.

    From the second task on, strength * T^2 * H(sigma(r_old / T), sigma(r / T)) is added for each pair. The first task is
    that of ``seqft``: before it there is the base alone, under which every r is 0 (but SimPO's, which has no reference), and
    nothing was learned that could be kept. The SFT stage, which prefers nothing, is left alone. The policy before the task is
    asked once a task.
    """

    whole_parameters = OUTSIDE_AN_ENGINE

    strength: float = 1.0  # weight of the distillation loss beside the stage's own
    temperature: float = 2.0  # T, which softens both preferences

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise UserError(f"strategy.strength={self.strength}: must be 0 or more, and finite")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"strategy.temperature={self.temperature}: must be positive, and finite")

    def setup(self, run: Run) -> None:
        self.before = PairTable()  # log-probabilities under the policy before the task, chosen and rejected

    def begin_task(self, context: Context) -> None:
        if context.task_number > 0:
            self.before = PairTable(context.task.train, context.run.score(context.task.train))

    def begin_stage(self, context: Context) -> None:
        if context.stage == "preference" and context.task_number > 0:
            self.before.check(context.task.train)

    def pair_terms(self, context: Context, seen: Seen) -> Mapping[str, torch.Tensor]:
        if context.stage != "preference" or context.task_number == 0:
            return {}
        old = self.before.of(seen.pairs).to(seen.logps.device, non_blocking=True)
        margins = reward_margins(context.run, seen.pairs, seen.logps.view(-1, 2))
        old_margins = reward_margins(context.run, seen.pairs, old)
        return {"lwf": self.strength * distillation(margins, old_margins, self.temperature)}

    def state_dict(self) -> State:
        return State(tensors=self.before.state_dict())

    def load_state_dict(self, state: State) -> None:
        self.before.load_state_dict(state.tensors)
