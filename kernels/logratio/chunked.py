"""Memory-lean torch implementation: logits exist for one chunk of tokens at a time.

The loss reaches a token's log-probability through the sum over its sequence, so its gradient is one number a sequence,
g_s. With a frozen head the whole backward is therefore known up to that number while the logits are at hand:

    d logp_t / d h_t = W[y_t] - sum_v p_v W[v]          (the *unit gradient*; with a soft cap, dz_capped/dz is folded in)

Forward stores it, in place of anything of vocabulary size, and backward multiplies it by g_s: nothing is recomputed. A
head that is trained needs the probabilities once more; they are recomputed a chunk at a time.
"""

from __future__ import annotations

import torch

from .reference import accumulation_dtype, head_logits, sum_by_sequence

CHUNK_ELEMENTS = 1 << 23  # logits held at once: 32 MiB in float32


def _chunk_rows(vocab: int) -> int:
    return max(16, CHUNK_ELEMENTS // vocab)


def _logit_gradient(logits: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor, softcap: float | None):
    """d logp / d (uncapped logits), (rows, vocab): one_hot(y) - p, times the slope of the soft cap. Overwrites logits."""
    slope = None if softcap is None else 1 - (logits / softcap) ** 2
    gradient = logits.sub_(lse[:, None]).exp_().neg_()
    gradient[torch.arange(len(targets), device=targets.device), targets] += 1
    return gradient if slope is None else gradient.mul_(slope)


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, sequence_ids, num_sequences, bias, softcap):
        needs_unit = ctx.needs_input_grad[0]
        token_logps = torch.empty(len(targets), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
        unit = torch.empty_like(hidden) if needs_unit else None
        rows = _chunk_rows(weight.shape[0])
        for start in range(0, len(targets), rows):
            piece = slice(start, start + rows)
            logits = head_logits(hidden[piece], weight, bias, softcap)
            lse = torch.logsumexp(logits, dim=-1)
            token_logps[piece] = logits.gather(-1, targets[piece, None]).squeeze(-1) - lse
            if needs_unit:
                unit[piece] = _logit_gradient(logits, lse, targets[piece], softcap).to(weight.dtype) @ weight
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
    rows = _chunk_rows(weight.shape[0])
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        logits = head_logits(hidden[piece], weight, bias, softcap)
        lse = torch.logsumexp(logits, dim=-1)
        gradient = _logit_gradient(logits, lse, targets[piece], softcap).mul_(scale[piece, None])
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
