"""Gradients that a strategy computes of its own, beside those of the step; for ZeRO stages 0 to 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lifealign.data.tokenize import Pair
from lifealign.models.policy import Policy
from lifealign.runtime import distributed
from lifealign.strategies.base import Run

_COLUMNS = 1 << 20
"""Columns whose products are taken at once in float64."""


def sample(pairs: Sequence[Pair], size: int | None, generator: torch.Generator) -> list[Pair]:
    """At most ``size`` of the pairs, drawn uniformly without replacement; None: all of them."""
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:size].tolist()]


def flatten(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One vector of all elements, float32; differentiable."""
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def unflatten(vector: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undoes :func:`flatten` of the values of ``like``: the parts of a vector by name, in their shapes."""
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for part, (name, tensor) in zip(parts, like.items(), strict=True)}


def mean_gradients(
    run: Run, stage: str, sets: Sequence[Sequence[Pair]], parameters: Sequence[nn.Parameter], *, at_once: int
) -> torch.Tensor:
    """(sets, parameters' elements) float32: the gradient of the stage's mean loss over each set, the same on every rank.

    The mean is over target tokens in SFT and over pairs in the preference stage, as in training, and there is no dropout. The
    pairs of a set go to ranks in turn; all sums over ranks are made in one exchange.

    Args:
        sets: pairs that the run has trained on; no set is empty.
        at_once: how many pairs a rank takes through the model together.
    """
    rows = torch.zeros(len(sets), sum(p.numel() for p in parameters), device=distributed.device())
    with _evaluating(run.policy):
        for row, pairs in zip(rows, sets, strict=True):
            size, own = sum(run.stages[stage].size(pair) for pair in pairs), _own(pairs)
            for start in range(0, len(own), at_once):
                row += _gradient(run.losses(stage, own[start : start + at_once]).sum() / size, parameters)
    return distributed.sum_over_ranks(rows)


def mean_squared_gradient(run: Run, stage: str, pairs: Sequence[Pair], parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """(parameters' elements,) float32: mean over pairs of the squares of each pair's own gradient, the same on every rank.

    Pairs are taken one at a time, without dropout: the square of a gradient over several would be another thing.
    """
    total = torch.zeros(sum(p.numel() for p in parameters), device=distributed.device())
    with _evaluating(run.policy):
        for pair in _own(pairs):
            total += _gradient(run.losses(stage, [pair]).sum(), parameters).square()
    return distributed.sum_over_ranks(total) / len(pairs)


def inner_products(rows: torch.Tensor) -> np.ndarray:
    """(n, n) float64 inner products of the rows of an (n, columns) matrix."""
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(_COLUMNS, dim=1):  # never a whole copy in float64
        products.addmm_(part.double(), part.double().T)
    return products.cpu().numpy()


def _own(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """This rank's share."""
    return pairs[distributed.rank() :: distributed.world_size()]


def _gradient(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Flat gradient of a loss; a parameter that it does not depend on (an expert nobody asked) has zeros."""
    return flatten(torch.autograd.grad(loss, list(parameters), materialize_grads=True))


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    """Inside, there is no dropout: gradients are those of the loss itself, and no random number of the training is used up.

    Layers that are to compute their activations again in backward (``model.gradient_checkpointing``) do so while they are in
    training mode alone, so they stay in it; what is inside of them does not. Where the model itself has dropout, which some
    layers apply in their own forward, they keep their activations.
    """
    was_training = policy.training
    policy.eval()
    drops = any("drop" in key and isinstance(value, float) and value > 0 for key, value in policy.base.config.to_dict().items())
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and not drops:
            module.training = True
    try:
        yield
    finally:
        policy.train(was_training)
