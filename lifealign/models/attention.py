"""Attention over rows packed on one line of a CPU batch, without a mask of the whole line.

Registered with transformers under a name of its own. Where a forward call carries ``packing``, rows are taken one after the
other and each row in pieces of queries, with the keys of the row up to the piece's end; nothing is computed for rows that do
not see each other, and of what causality hides only a corner of each piece. In the last layer only positions that predict a
token are queries. Without ``packing``, as in generation, it is transformers' own SDPA attention.

A piece is a few batched matrix products with a backward of its own. At the lengths of preference pairs that was measured to
be a quarter faster than torch's fused attention for CPUs, whose blocks are smaller than suits its matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "lifealign_packed"

QUERIES = 128
"""Most queries in a piece: fewer waste less on what causality hides, more make larger matrix products."""

KEPT_SCORES = 1 << 24
"""Most attention probabilities that a layer keeps for its backward, 64 MiB in float32; a layer with more makes them again."""


class Piece(NamedTuple):
    """Queries of a row and the keys up to the last of them, as positions on the line."""

    queries: slice
    keys: slice
    mask: torch.Tensor  # (queries, keys) float32: 0 where a query sees a key, else -inf
    is_last: bool  # of its row, so that its keys are all of the row's


class Packing:
    """Who sees whom on a packed line; made once a batch and used by every layer.

    Args:
        spans: a row each: tokens of its prompt, then of each response.
    """

    def __init__(self, spans: Sequence[tuple[int, ...]]) -> None:
        starts = list(accumulate(map(sum, spans), initial=0))[:-1]
        self.pieces = [p for start, span in zip(starts, spans, strict=True) for p in _row_pieces(start, span, 0)]
        # The last token of a prompt is the first that predicts a token of a response.
        self.predicting = [p for start, span in zip(starts, spans, strict=True) for p in _row_pieces(start, span, span[0] - 1)]


def _row_pieces(start: int, span: tuple[int, ...], first: int) -> list[Piece]:
    """A row from ``start`` of the line, its queries from token ``first`` of the row on; its last piece comes first."""
    tokens = sum(span)
    segments = torch.arange(len(span)).repeat_interleave(torch.tensor(span))
    number = -(-(tokens - first) // QUERIES)
    pieces = []
    for low, high in pairwise(first + (tokens - first) * i // number for i in range(number + 1)):
        seen = (segments[:high] == 0) | (segments[low:high, None] == segments[:high])
        hidden = ~seen.tril(low)
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        pieces.append(Piece(slice(start + low, start + high), slice(start, start + high), mask, high == tokens))
    return pieces[::-1]


class _PackedAttention(torch.autograd.Function):
    """Grouped-query attention, piece by piece; positions that are no query come out as 0.

    Query heads that share a key head are rows of one matrix, so that keys are never repeated. bfloat16 is computed in
    float32, in which the products of a piece were measured to be faster too.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: list[Piece], scale: float
    ) -> torch.Tensor:
        dtype = query.dtype
        query, key, value = (x[0].to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
        query = query.unflatten(0, (len(key), -1))  # (key heads, query heads a key head, tokens, width)
        groups, heads, tokens, width = query.shape
        output = query.new_zeros(tokens, groups, heads, width).permute(1, 2, 0, 3)
        keep = sum(piece.mask.numel() for piece in pieces) * groups * heads <= KEPT_SCORES
        kept = []
        for piece in pieces:
            probabilities = _probabilities(query, key, piece, scale)
            output[:, :, piece.queries] = (probabilities @ value[:, piece.keys]).unflatten(1, (heads, -1))
            kept.append(probabilities if keep else None)
        ctx.pieces, ctx.scale = pieces, scale
        ctx.save_for_backward(query, key, value, *kept)
        return output.flatten(0, 1).unsqueeze(0).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        dtype = gradient.dtype
        gradient = gradient[0].to(query.dtype).unflatten(0, query.shape[:2])
        # Every key is written by its row's last piece before another piece adds to it.
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value)
        for piece, p in zip(ctx.pieces, kept, strict=True):
            p = _probabilities(query, key, piece, ctx.scale) if p is None else p
            g, q = (x[:, :, piece.queries].flatten(1, 2) for x in (gradient, query))
            of_p = g @ value[:, piece.keys].mT
            # Through softmax, and times the scale: p * (of_p - sum(p * of_p)).
            of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype).mul_(ctx.scale)
            grad_query[:, :, piece.queries] = (of_scores @ key[:, piece.keys]).unflatten(1, (query.shape[1], -1))
            for whole, part in ((grad_key, of_scores.mT @ q), (grad_value, p.mT @ g)):
                if piece.is_last:
                    whole[:, piece.keys] = part
                else:
                    whole[:, piece.keys] += part
        gradients = grad_query.flatten(0, 1), grad_key, grad_value
        return *(x.unsqueeze(0).to(dtype) for x in gradients), None, None


def _probabilities(query: torch.Tensor, key: torch.Tensor, piece: Piece, scale: float) -> torch.Tensor:
    """(key heads, query heads a key head x queries, keys)."""
    q = query[:, :, piece.queries].flatten(1, 2)
    mask = piece.mask.to(q.dtype).repeat(query.shape[1], 1).expand(len(q), -1, -1)
    return torch.softmax(torch.baddbmm(mask, q, key[:, piece.keys].mT, alpha=scale), -1)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface.

    Args:
        query: (1, heads, tokens, width).
        key, value: (1, key heads, tokens, width).

    Returns:
        (1, tokens, heads, width), and no attention weights.

    Raises:
        NotImplementedError: for attention dropout or a soft cap; rows of such a model are laid out otherwise.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout or kwargs.get("softcap") is not None:
        raise NotImplementedError("rows are not packed for models with attention dropout or a soft cap of attention scores")
    is_last_layer = module.layer_idx == module.config.num_hidden_layers - 1
    pieces = packing.predicting if is_last_layer else packing.pieces
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _PackedAttention.apply(query, key, value, pieces, scale).transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
