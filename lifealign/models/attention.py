"""Attention over rows packed on one line of a CPU batch, without a mask of the whole line.

Registered with transformers under a name of its own. Where a forward call carries ``packing``, rows are taken one after the
other and each row in pieces of queries, each with the keys that it sees; nothing is computed between rows, nor between the
responses of a pair, and of what causality hides only a corner of each piece. In the last layer only positions that predict
a token are queries. Without ``packing``, as in generation, it is transformers' own SDPA attention.

A piece is a few batched matrix products with a backward of its own. At the lengths of preference pairs that was measured to
be a quarter faster than torch's fused attention for CPUs, whose blocks are smaller than suits its matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
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
    """Queries that follow each other in a row, and the keys that they see: one stretch of a packing's order of keys."""

    queries: int
    start: int  # of the stretch
    keys: int
    backwards: bool  # the queries' own tokens are the first of the stretch, the latest in front; otherwise the last of it
    hidden: slice  # keys of the stretch that no query sees, beside those that causality hides


class Plan(NamedTuple):
    """What a layer computes: pieces of queries, one after the other."""

    pieces: list[Piece]
    positions: torch.Tensor | None  # of the queries on the line; None: all
    order: torch.Tensor  # (tokens,) position on the line of each key
    place: torch.Tensor  # (tokens,) place in that order of each position


class Packing:
    """Who sees whom on a packed line; made once a batch and used by every layer.

    A token of the first response sees the prompt and its own response up to itself, and so does one of the second. The keys
    of a row are therefore ordered: second response backwards, prompt, first response. Then both see one stretch of keys, and
    none is computed that only the other sees. Further responses follow, and see a stretch with a hidden part.

    Args:
        spans: a row each: positions of its prompt, then of each response.
    """

    def __init__(self, spans: Sequence[tuple[int, ...]]) -> None:
        starts = list(accumulate(map(sum, spans), initial=0))[:-1]
        rows = list(zip(starts, spans, strict=True))
        order = torch.cat([_key_order(start, span) for start, span in rows])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        self.everywhere = Plan([p for start, span in rows for p in _row_pieces(start, span, 0)], None, order, place)
        # The last token of a prompt is the first that predicts a token of a response.
        pieces = [p for start, span in rows for p in _row_pieces(start, span, span[0] - 1)]
        positions = torch.cat([torch.arange(start + span[0] - 1, start + sum(span)) for start, span in rows])
        self.predicting = Plan(pieces, positions, order, place)


def _key_order(start: int, span: tuple[int, ...]) -> torch.Tensor:
    """Positions of a row's tokens, in the order of its keys."""
    ahead, turned = sum(span[:2]), sum(span[2:3])
    positions = torch.arange(start, start + sum(span))
    return torch.cat((positions[ahead : ahead + turned].flip(0), positions[:ahead], positions[ahead + turned :]))


def _row_pieces(start: int, span: tuple[int, ...], first: int) -> Iterator[Piece]:
    """A row from ``start`` of the line; its queries from token ``first`` of the row on, which the prompt or the first
    response holds."""
    prompt, ahead, turned = span[0], sum(span[:2]), sum(span[2:3])
    start += turned
    for low, high in _cut(first, ahead):
        yield Piece(high - low, start, high, backwards=False, hidden=slice(0))
    for low, high in _cut(0, turned):
        yield Piece(high - low, start - high, high + prompt, backwards=True, hidden=slice(0))
    for length in span[3:]:
        for low, high in _cut(0, length):
            yield Piece(high - low, start, ahead + high, backwards=False, hidden=slice(prompt, ahead))
        ahead += length


def _cut(low: int, high: int) -> Iterator[tuple[int, int]]:
    number = -(-(high - low) // QUERIES)
    return pairwise(low + (high - low) * i // number for i in range(number + 1)) if number else iter(())


class _PackedAttention(torch.autograd.Function):
    """Grouped-query attention, piece by piece; positions that are no query come out as 0.

    Query heads that share a key head are rows of one matrix, so that keys are never repeated. bfloat16 is computed in
    float32, in which the products of a piece were measured to be faster too.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float
    ) -> torch.Tensor:
        groups, heads = key.shape[1], query.shape[1] // key.shape[1]
        rows = [piece.queries * heads for piece in plan.pieces]
        q = _by_group(query, groups, plan.positions)
        q = torch.mul(q, scale, out=q.new_empty(q.shape)).flatten(1, 2)
        k, v = (_by_group(x, groups, plan.order).flatten(1, 2) for x in (key, value))
        keep = sum(piece.queries * piece.keys for piece in plan.pieces) * groups * heads <= KEPT_SCORES
        outputs, kept = [], []
        for piece, q_piece in zip(plan.pieces, q.split(rows, 1), strict=True):
            p = _probabilities(q_piece, k, piece)
            outputs.append(torch.bmm(p, v.narrow(1, piece.start, piece.keys)))
            kept.append(p if keep else None)
        ctx.plan, ctx.scale, ctx.rows = plan, scale, rows
        ctx.save_for_backward(q, k, v, *kept)
        return _by_head(torch.cat(outputs, 1), query, plan.positions)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        plan, v_turned = ctx.plan, v.mT
        g = _by_group(gradient, len(k), plan.positions).flatten(1, 2)
        of_q, of_v = [], torch.zeros_like(v)
        of_k = torch.zeros_like(k) if ctx.needs_input_grad[1] else None  # nothing trains below the keys of the first layer
        for piece, p, q_piece, g_piece in zip(plan.pieces, kept, q.split(ctx.rows, 1), g.split(ctx.rows, 1), strict=True):
            p = _probabilities(q_piece, k, piece) if p is None else p
            of_p = torch.bmm(g_piece, v_turned.narrow(2, piece.start, piece.keys))
            # Through softmax: p * (of_p - sum(p * of_p)).
            of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
            of_q.append(torch.bmm(of_scores, k.narrow(1, piece.start, piece.keys)))
            if of_k is not None:
                of_k.narrow(1, piece.start, piece.keys).add_(torch.bmm(of_scores.mT, q_piece))
            of_v.narrow(1, piece.start, piece.keys).add_(torch.bmm(p.mT, g_piece))
        grad_query = _by_head(torch.cat(of_q, 1).mul_(ctx.scale), gradient, plan.positions)
        grad_key, grad_value = (None if x is None else _by_position(x, plan, gradient.dtype) for x in (of_k, of_v))
        return grad_query, grad_key, grad_value, None, None


def _by_group(x: torch.Tensor, groups: int, positions: torch.Tensor | None) -> torch.Tensor:
    """(1, heads, tokens, width) as (groups, positions, heads of a group, width), in float32 at least."""
    by_token = x[0].transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    chosen = by_token if positions is None else by_token.index_select(0, positions)
    return chosen.unflatten(1, (groups, -1)).transpose(0, 1)


def _by_position(rows: torch.Tensor, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """(groups, tokens in the order of keys, width) as (1, groups, tokens on the line, width)."""
    return rows.index_select(1, plan.place)[None].to(dtype)


def _by_head(rows: torch.Tensor, like: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """(groups, positions x heads of a group, width) in the shape and dtype of ``like``; 0 at other positions."""
    _, heads, tokens, width = like.shape
    number = tokens if positions is None else len(positions)
    by_token = rows.unflatten(1, (number, -1)).transpose(0, 1).reshape(number, heads, width).to(like.dtype)
    if positions is not None:
        by_token = by_token.new_zeros(tokens, heads, width).index_copy_(0, positions, by_token)
    return by_token.transpose(0, 1)[None]


def _probabilities(q: torch.Tensor, k: torch.Tensor, piece: Piece) -> torch.Tensor:
    """(groups, queries x heads of a group, keys)."""
    number, rows = piece.queries, q.shape[1]
    scores = torch.bmm(q, k.mT.narrow(2, piece.start, piece.keys))
    later = _later(QUERIES, rows // number, q.dtype, piece.backwards)
    if piece.backwards:
        scores.narrow(2, 0, number).add_(later[:rows, -number:])
    else:
        scores.narrow(2, piece.keys - number, number).add_(later[:rows, :number])
    if piece.hidden.stop:
        scores[:, :, piece.hidden] = -torch.inf
    return torch.softmax(scores, -1, out=scores)


@cache
def _later(queries: int, heads: int, dtype: torch.dtype, backwards: bool) -> torch.Tensor:
    """(queries x heads, queries): -inf where a key is later than the query, else 0."""
    table = torch.full((queries, queries), -torch.inf, dtype=dtype).triu_(1).repeat_interleave(heads, 0)
    return table.flip(1) if backwards else table


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
    plan = packing.predicting if is_last_layer else packing.everywhere
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _PackedAttention.apply(query, key, value, plan, scale).transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
