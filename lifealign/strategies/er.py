"""Experience replay: pairs of past tasks are mixed into each new one (LifeAlign, Replay; Chaudhry et al., 2019, 1902.10486)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from lifealign.data.replay import ReplayBuffer, Reservoir
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.registry import register
from lifealign.strategies.base import Context, Run, State, Strategy


class Buffer(Enum):
    """Whose pairs are held."""

    uniform = "uniform"  # a uniform share of each task, the oldest leaving first
    reservoir = "reservoir"  # a uniform sample of everything met so far


@register("strategy", "er")
class ExperienceReplay(Strategy):
    """Both stages of a task train on its own pairs and on all of the buffer."""

    buffer: Buffer = Buffer.uniform
    buffer_size: int = 3000  # pairs held at most
    buffer_fraction: float = 0.2  # share of each task's own pairs that enters, drawn uniformly; not for the reservoir

    def __post_init__(self) -> None:
        if self.buffer_size < 0:
            raise UserError(f"strategy.buffer_size={self.buffer_size}: must be 0 or more")
        if not 0 <= self.buffer_fraction <= 1:
            raise UserError(f"strategy.buffer_fraction={self.buffer_fraction}: must lie in [0, 1]")

    def setup(self, run: Run) -> None:
        uniform = self.buffer is Buffer.uniform
        self.memory = ReplayBuffer(self.buffer_size, self.buffer_fraction) if uniform else Reservoir(self.buffer_size)

    def train_data(self, context: Context, pairs: Sequence[Pair]) -> Sequence[Pair]:
        return [*pairs, *self.memory.pairs]

    def end_task(self, context: Context) -> None:
        self.memory.add(context.task.train, context.generator("replay buffer"))

    def state_dict(self) -> State:
        return State({"buffer": self.memory.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.memory.load_state_dict(state.values["buffer"])
