"""Distillation of the policy before a task from its own answers to the task's prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from lifealign.data.batch import Row, collate
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.evaluation.generation import sample
from lifealign.models.loading import pad_token_id
from lifealign.models.scoring import pair_key
from lifealign.registry import register
from lifealign.runtime import distributed
from lifealign.strategies.base import Context, Run, Seen, State, Strategy
from lifealign.strategies.lwf import OUTSIDE_AN_ENGINE


@register("strategy", "kl")
class Distillation(Strategy):
    """The policy is held to answer the task's prompts as it did before the task: forward KL(pi_old || pi) of whole answers.

    From the second task on the policy before it answers a uniform sample of the task's own prompts, drawn at temperature 1
    from the whole vocabulary. In both stages the negative log-likelihood of these answers is added to the loss. Since

        KL(pi_old || pi) = E_{y ~ pi_old}[-log pi(y|x)] - H(pi_old)

    and the entropy does not depend on pi, its gradient is an unbiased estimate of the KL's (sequence-level distillation, Kim
    & Rush, 2016, arXiv 1606.07947, with samples in place of a beam). It is a mean over the tokens of all answers::

        strength * sum_y -log pi(y|x) / sum_y |y|

    which is the KL of an answer times a constant, 1 over the mean length. An answer cut off at ``max_new_tokens`` is held
    to as far as it goes: the KL of the first so many tokens.

    An answer is learned beside the pair whose prompt it answers, scaled by pairs / answers, so that the mean over a global
    batch is in expectation the mean above, each epoch sees every answer once, and nothing depends on how batches are split.
    The first task is that of ``seqft``.
    """

    whole_parameters = OUTSIDE_AN_ENGINE

    strength: float = 1.0  # weight of the mean negative log-likelihood of a token beside the stage's own loss
    prompts: int = 128  # of the task, answered at most; drawn uniformly
    max_new_tokens: int = 64  # longest answer

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise UserError(f"strategy.strength={self.strength}: must be 0 or more, and finite")
        for key in ("prompts", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"strategy.{key}={getattr(self, key)}: must be at least 1")

    def setup(self, run: Run) -> None:
        self._take({})

    def _take(self, answers: dict[str, list[int]]) -> None:
        self.answers = answers  # token ids, by the key of the pair in hexadecimal digits
        self._tokens: int | None = None  # of the answers that an epoch meets, once that is counted

    def begin_task(self, context: Context) -> None:
        if context.task_number == 0:
            return
        run, pairs = context.run, context.task.train
        drawn = torch.randperm(len(pairs), generator=context.generator("prompts"))[: self.prompts].tolist()
        answers = sample(
            run.policy,
            run.policy,
            [pairs[i].prompt for i in drawn],
            run.tokenizer,
            batch_size=run.batch_size,
            max_new_tokens=self.max_new_tokens,
            seed=context.generator("answers").initial_seed(),
        )
        self._take({pair_key(pairs[i]).hex(): answer for i, answer in zip(drawn, answers, strict=True)})

    def pair_terms(self, context: Context, seen: Seen) -> Mapping[str, torch.Tensor]:
        if context.task_number == 0:
            return {}
        keys = [pair_key(pair).hex() for pair in seen.pairs]
        places = [i for i, key in enumerate(keys) if key in self.answers]
        terms = torch.zeros(len(seen.pairs), device=seen.logps.device)
        if places:
            rows = [Row(seen.pairs[i].prompt, [self.answers[keys[i]]]) for i in places]
            scale = self.strength * len(context.task.train) / self._tokens_of(context.task.train)
            terms[places] = -scale * self._logps(context.run, rows)
        return {"kl": terms}

    def _tokens_of(self, pairs: Sequence[Pair]) -> int:
        """Tokens of answers that an epoch over the task's pairs meets; a pair that stands twice has its answer twice."""
        if self._tokens is None:
            self._tokens = sum(len(self.answers.get(pair_key(pair).hex(), ())) for pair in pairs)
        return self._tokens

    def _logps(self, run: Run, rows: list[Row]) -> torch.Tensor:
        """(rows,) log-probability of each row's one response, differentiable."""
        rows = [run.policy.prefixed(row) for row in rows]
        batch = collate(rows, layout=run.policy.layout, pad_token_id=pad_token_id(run.tokenizer))
        return run.policy(batch.to(distributed.device()))

    def state_dict(self) -> State:
        return State({"answers": self.answers})

    def load_state_dict(self, state: State) -> None:
        self._take(state.values["answers"])

    def stage_state(self) -> State:
        """The answers that this stage is held to: drawn again, on another device, a token of them might be another."""
        return self.state_dict()

    def load_stage_state(self, state: State) -> None:
        self._take(state.values.get("answers", self.answers))
