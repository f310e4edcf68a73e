"""The operation as one would write it on paper; the yardstick of every other implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the dtypes of models, float64 for the tests that ask for it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = linear,
) -> torch.Tensor:
    """(tokens, vocab) logits in the accumulation dtype."""
    logits = product(hidden, weight).to(accumulation_dtype(hidden.dtype))
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def sum_by_sequence(token_logps: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """(num_sequences,) sums in the dtype of ``token_logps``, taken in float64: responses run to thousands of tokens."""
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, sequence_ids, token_logps.double()).to(token_logps.dtype)


def reference_sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_sequences: int,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See :func:`lifealign.kernels.sequence_logps`. Holds a (tokens, vocab) tensor; gradients are autograd's."""
    logps = torch.log_softmax(head_logits(hidden, weight, bias, softcap), dim=-1)
    token_logps = logps.gather(-1, targets[:, None]).squeeze(-1)
    return sum_by_sequence(token_logps, sequence_ids, num_sequences)
