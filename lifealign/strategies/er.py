"""Experience replay: pairs of past tasks are mixed into each new one (LifeAlign, Replay; Chaudhry et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from lifealign.data.replay import ReplayBuffer
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.registry import register
from lifealign.strategies.base import Context, Run, State, Strategy


@register("strategy", "er")
class ExperienceReplay(Strategy):
    """Both stages of a task train on its own pairs and on all of the buffer."""

    buffer_size: int = 3000  # pairs held at most
    buffer_fraction: float = 0.2  # share of each task's own pairs that enters, drawn uniformly

    def __post_init__(self) -> None:
        if self.buffer_size < 0:
            raise UserError(f"strategy.buffer_size={self.buffer_size}: must be 0 or more")
        if not 0 <= self.buffer_fraction <= 1:
            raise UserError(f"strategy.buffer_fraction={self.buffer_fraction}: must lie in [0, 1]")

    def setup(self, run: Run) -> None:
        self.buffer = ReplayBuffer(self.buffer_size, self.buffer_fraction)

    def train_data(self, context: Context, pairs: Sequence[Pair]) -> Sequence[Pair]:
        return [*pairs, *self.buffer.pairs]

    def end_task(self, context: Context) -> None:
        self.buffer.add(context.task.train, context.generator("replay buffer"))

    def state_dict(self) -> State:
        return State({"buffer": self.buffer.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.buffer.load_state_dict(state.values["buffer"])
