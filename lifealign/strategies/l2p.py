"""Learning to Prompt: prompts of a pool, picked by the row, are all that is trained (L2P; Wang et al., arXiv 2112.08654)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lifealign.errors import UserError
from lifealign.models.policy import Policy
from lifealign.models.prompt_pool import PromptPool
from lifealign.registry import register
from lifealign.strategies.base import Context, Run, Seen, State, Strategy, seeded_generator


@register("strategy", "l2p")
class L2P(Strategy):
    """The base and its adapter stay as they are; the loss of a pair (eq. 5) gains ``pull`` times the distances of its keys.

    A row reads the ``top_k`` prompts whose keys are nearest to its query (eq. 3), so tasks whose prompts differ train
    different prompts of the pool, and nobody need know the task of a row. Sizes are in the range of the paper's experiments.

    ``diversity`` is its optional prior on task boundaries (eq. 4): while a task trains, a prompt's distance is multiplied
    by the share of earlier selections that fell on it. The exponent on that share is ours: 0 is eq. 3, 1 is eq. 4. Shares
    are of the training rows of each finished task, under the keys that it ended with.
    """

    whole_parameters = "rows look their queries up in the base's whole input embedding"

    pool_size: int = 10  # prompts in the pool
    prompt_length: int = 5  # vectors a prompt
    top_k: int = 5  # prompts in front of each row
    pull: float = 0.5  # lambda: weight of the distance of selected keys to their query
    diversity: float = 0.0  # 0: the nearest keys; 1: prompts that earlier tasks used are as much farther

    @property
    def prefix_tokens(self) -> int:
        return self.top_k * self.prompt_length

    def __post_init__(self) -> None:
        for key in ("prompt_length", "top_k"):
            if getattr(self, key) < 1:
                raise UserError(f"strategy.{key}={getattr(self, key)}: must be at least 1")
        if self.pool_size < self.top_k:
            raise UserError(f"strategy.pool_size={self.pool_size}: must be at least strategy.top_k, {self.top_k}")
        for key in ("pull", "diversity"):
            if getattr(self, key) < 0:
                raise UserError(f"strategy.{key}={getattr(self, key)}: must be 0 or more")

    def setup_model(self, policy: Policy, seed: int) -> None:
        policy.model.requires_grad_(False)
        generator = seeded_generator(seed, "prompt pool")
        self.pool = PromptPool(policy, size=self.pool_size, length=self.prompt_length, top_k=self.top_k, generator=generator)

    def setup(self, run: Run) -> None:
        self.selections = torch.zeros(self.pool_size)

    def begin_stage(self, context: Context) -> None:
        shares = self.selections / self.selections.sum().clamp(min=1)
        # Prompts that were never selected would all cost nothing; a small share leaves them to their distances.
        self.pool.penalty = shares.clamp(min=1e-6) ** self.diversity

    def pair_terms(self, context: Context, seen: Seen) -> Mapping[str, torch.Tensor]:
        """The pull on the keys; where a pair stands on two lines, both have the same query and count half."""
        pulls = self.pool.distances.sum(1).view(len(seen.pairs), -1).mean(1)
        return {"pull": self.pull * pulls}

    def end_task(self, context: Context) -> None:
        queries = self.pool.queries([pair.prompt for pair in context.task.train])
        selected, _ = self.pool.select(queries, penalised=True)
        self.selections += selected.flatten().bincount(minlength=self.pool_size).cpu()

    def state_dict(self) -> State:
        return State(tensors={"selections": self.selections})

    def load_state_dict(self, state: State) -> None:
        self.selections = state.tensors["selections"]
