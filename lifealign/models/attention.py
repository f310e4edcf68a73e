"""Attention over rows packed on one line, without a mask of the whole line.

Registered with transformers under a name of its own. Where a forward call carries ``spans`` (see
``lifealign.data.batch.Batch``), each prompt attends to itself and each response to its prompt and itself; every piece is one
call of torch's fused attention, so nothing is computed for pairs of tokens that do not see each other. Without ``spans``, as
in generation, it is transformers' own SDPA attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "lifealign_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    spans: tuple[tuple[int, ...], ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface.

    Args:
        query: (1, heads, tokens, width).
        key, value: (1, key heads, tokens, width).
        spans: a row each: tokens of its prompt, then of each response.

    Returns:
        (1, tokens, heads, width), and no attention weights.
    """
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    # split's backward is one concatenation; slices would each add a gradient of the whole line.
    lengths = [length for span in spans for length in _pieces(span)]
    pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for span in spans:
        q, prompt_k, prompt_v = next(pieces)
        outputs.append(scaled_dot_product_attention(q, prompt_k, prompt_v, is_causal=True, **options))
        for _ in _pieces(span)[1:]:
            q, k, v = next(pieces)
            k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=_suffix_mask(q, k), **options))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _pieces(span: tuple[int, ...]) -> tuple[int, ...]:
    """A prompt with a single response is one causal sequence; with several, each response is a piece of its own."""
    return (sum(span),) if len(span) == 2 else span


def _suffix_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(queries, keys) bool for queries that are the last of the keys."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
