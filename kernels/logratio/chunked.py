"""Memory-lean torch implementation: logits exist for one chunk of tokens at a time.

The loss reaches a token's log-probability through the sum over its sequence, so its gradient is one number a sequence,
g_s. With a frozen head the whole backward is therefore known up to that number while the logits are at hand:

    d logp_t / d h_t = W[y_t] - sum_v p_v W[v]          (the *unit gradient*; with a soft cap, dz_capped/dz is folded in)

Forward stores it, in place of anything of vocabulary size, and backward multiplies it by g_s: nothing is recomputed. A
head that is trained needs the probabilities once more; they are recomputed a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..products import product
from .reference import accumulation_dtype, head_logits, sum_by_sequence

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in float32


def _chunks(tokens: int, vocab: int) -> Iterator[slice]:
    rows = max(16, CHUNK_ELEMENTS // vocab)
    return (slice(start, start + rows) for start in range(0, tokens, rows))


def _logps_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (rows,), and minus their gradient to the logits (rows, vocab): p - one_hot(target), times the slope
    of the soft cap.

    Overwrites logits. The largest probability is 1 / sum exp(z - max z), so one pass of softmax yields the sum too. The
    target is subtracted here, in the accumulation dtype: in bfloat16 a p_target close to 1 would be rounded to 1.
    """
    targets = targets[:, None]
    shifted = logits.gather(-1, targets) - logits.amax(-1, keepdim=True)
    slope = None if softcap is None else 1 - (logits / softcap) ** 2
    p = torch.softmax(logits, -1, out=logits)
    logps = (shifted + p.amax(-1, keepdim=True).log()).squeeze(-1)
    p.scatter_add_(-1, targets, p.new_full(targets.shape, -1.0))
    return logps, p if slope is None else p.mul_(slope)


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, sequence_ids, num_sequences, bias, softcap):
        needs_unit = ctx.needs_input_grad[0]
        token_logps = torch.empty(len(targets), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
        unit = torch.empty_like(hidden) if needs_unit else None
        for piece in _chunks(len(targets), weight.shape[0]):
            logits = head_logits(hidden[piece], weight, bias, softcap, product)
            token_logps[piece], gradient = _logps_and_gradient(logits, targets[piece], softcap)
            if needs_unit:
                unit[piece] = product(gradient.to(weight.dtype), weight.T).neg_()
        ctx.softcap = softcap
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[5]
        ctx.save_for_backward(unit, targets, sequence_ids, *((hidden, weight, bias) if trains_head else (None,) * 3))
        return sum_by_sequence(token_logps, sequence_ids, num_sequences)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        unit, targets, sequence_ids, hidden, weight, bias = ctx.saved_tensors
        scale = grad_logps[sequence_ids]
        grad_hidden = None if unit is None else unit * scale[:, None].to(unit.dtype)
        grad_weight = grad_bias = None
        if hidden is not None:
            grad_weight, grad_bias = _head_gradients(hidden, weight, targets, bias, ctx.softcap, scale)
        return grad_hidden, grad_weight, None, None, None, grad_bias, None


def _head_gradients(hidden, weight, targets, bias, softcap, scale):
    """Gradients of a trained head, (vocab, d) and (vocab,), summed over chunks in the accumulation dtype."""
    dtype = accumulation_dtype(hidden.dtype)
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
    for piece in _chunks(len(targets), weight.shape[0]):
        logits = head_logits(hidden[piece], weight, bias, softcap, product)
        _, gradient = _logps_and_gradient(logits, targets[piece], softcap)
        gradient.mul_(-scale[piece, None])
        grad_weight.addmm_(gradient.T, hidden[piece].to(dtype))
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
    return grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype)


def chunked_sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_sequences: int,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See :func:`lifealign.kernels.sequence_logps`."""
    return _SequenceLogps.apply(hidden, weight, targets, sequence_ids, num_sequences, bias, softcap)
