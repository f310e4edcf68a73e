"""Score the policy on the held-out pairs of one task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lifealign.data.tasks import Task
from lifealign.data.tokenize import Pair
from lifealign.evaluation.generation import generate, generation_keys
from lifealign.evaluation.judge import Item, Judge, JudgeResult
from lifealign.evaluation.options import EvaluationOptions
from lifealign.evaluation.preference import PREFERENCE_METRICS, preference_metrics
from lifealign.evaluation.text import TEXT_METRICS
from lifealign.models.loading import pad_token_id
from lifealign.models.policy import Policy
from lifealign.models.scoring import ReferenceCounts, ReferenceLogps, score_pairs


@dataclass(frozen=True)
class Evaluation:
    """Scores by metric, what the policy said of each held-out pair, where the rest came from, and what a judge took.

    What is no finite number, where the policy overflows on a row, is None: JSON has no NaN, and it is no score. So is the
    judge's where it could grade nothing.
    """

    scores: dict[str, float | None]
    predictions: list[dict[str, Any]]
    reference: ReferenceCounts
    judged: JudgeResult | None = None
    reused: int = 0  # answers that were known already


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass
class Evaluator:
    """Scores tasks; ``beta`` is the objective's, since margins are in its units. Every call is made on every rank."""

    policy: Policy
    reference: ReferenceLogps
    tokenizer: PreTrainedTokenizerBase
    options: EvaluationOptions
    beta: float
    judge: Judge | None = None  # where it is among the metrics
    known: Mapping[str, str] = field(default_factory=dict)  # answers by generation key, the same on every rank

    def evaluate(self, module: nn.Module, task: Task) -> Evaluation:
        """Score ``module``, the policy or the engine around it, on the task's held-out pairs."""
        pairs = task.test
        wanted = set(self.options.metrics)
        scores: dict[str, float | None] = {}
        counts, judged, reused = ReferenceCounts(0, 0, 0), None, 0
        rows = [{"id": p.id, "prompt": p.prompt_text, "chosen": p.chosen_text, "rejected": p.rejected_text} for p in pairs]
        if wanted & set(PREFERENCE_METRICS):
            sizes = {"batch_size": self.options.batch_size, "pad_token_id": pad_token_id(self.tokenizer)}
            counts = self.reference.ensure(module, self.policy, pairs, **sizes)
            logps, margins, scores = self._preference(module, pairs, sizes)
            for row, (chosen, rejected), margin in zip(rows, logps.tolist(), margins.tolist(), strict=True):
                row |= {"chosen_logp": finite(chosen), "rejected_logp": finite(rejected), "margin": finite(margin)}
        if self.options.generates:
            answered = pairs[: self.options.max_generations]
            keys, texts, reused = self._answers(module, answered)
            for row, key, text in zip(rows, keys, texts, strict=False):
                row |= {"generation": key, "prediction": text}
            scores |= {name: metric(texts, [p.chosen_text for p in answered]) for name, metric in TEXT_METRICS.items()}
            if self.judge is not None:
                items = [Item(pair.prompt_text, text) for pair, text in zip(answered, texts, strict=True)]
                judged = self.judge.grade(task.name, items)
                scores["judge"] = judged.score
                for row, grade in zip(rows, judged.grades, strict=False):
                    row["judge"] = grade
        return Evaluation({name: finite(scores[name]) for name in self.options.metrics}, rows, counts, judged, reused)

    def _answers(self, module: nn.Module, pairs: Sequence[Pair]) -> tuple[list[str], list[str], int]:
        """Generation keys, greedy answers, and how many of these were known; only the others are generated."""
        prompts, most = [pair.prompt for pair in pairs], self.options.max_new_tokens
        keys = generation_keys(self.policy, prompts, self.tokenizer, max_new_tokens=most)
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self.known}
        new: dict[str, str] = {}
        if missing:
            left, sizes = list(missing.values()), {"batch_size": self.options.batch_size, "max_new_tokens": most}
            new = dict(zip(missing, generate(module, self.policy, left, self.tokenizer, **sizes), strict=True))
        reused = sum(key in self.known for key in keys)
        return keys, [self.known[key] if key in self.known else new[key] for key in keys], reused

    def probe(self, module: nn.Module, task: Task) -> dict[str, float]:
        """The preference scores of the first few held-out pairs of a task."""
        sizes = {"batch_size": self.options.batch_size, "pad_token_id": pad_token_id(self.tokenizer)}
        pairs = task.test[: self.options.probe_pairs]
        self.reference.ensure(module, self.policy, pairs, **sizes)
        return self._preference(module, pairs, sizes)[2]

    def _preference(
        self, module: nn.Module, pairs: Sequence[Pair], sizes: dict[str, int]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        logps, reference = score_pairs(module, self.policy, pairs, **sizes), self.reference.of(pairs)
        gains = (logps - reference).double()
        lengths = torch.tensor([len(p.chosen) for p in pairs])
        scores = preference_metrics(logps, reference, lengths, beta=self.beta)
        return logps, self.beta * (gains[:, 0] - gains[:, 1]), scores
