"""Attention over rows packed on one line as one FlexAttention kernel, for cards.

On a CPU the line is cut into pieces (:mod:`lifealign.models.attention`); on a card so many small calls leave most of it idle.
Here the whole line is one call, which skips every block of 128 x 128 pairs of tokens in which nobody sees anybody. The block
mask travels as the ``attention_mask`` of the model's forward: transformers hands on what has four dimensions, and so makes no
mask of its own. Without a block mask, as in generation, it is transformers' own SDPA attention.

The compiled kernel has never been run on a card by this project, so :func:`kernel_error` is there to be asked before training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "lifealign_flex"

BLOCK = 128
"""Tokens a block; FlexAttention's own default."""


@lru_cache(maxsize=1)  # a batch that is accumulated over, or scored twice in a row, makes it once
def block_mask(spans: tuple[tuple[int, ...], ...], device: torch.device) -> BlockMask:
    """Who sees whom on the line on which rows stand one behind another.

    torch's ``create_block_mask`` evaluates the mask for every pair of tokens, a billion of them at 32k tokens, or has to be
    compiled to avoid that. Which blocks matter follows from where the pieces begin and end; that is a table of blocks by
    blocks, 256 x 256 at 32k tokens, made on the CPU.

    Args:
        spans: a row each: positions of its prompt, then of each response.

    Returns:
        A mask of shape (1, 1, tokens, tokens).
    """
    lengths = torch.tensor([length for span in spans for length in span])  # of each piece: a prompt or a response
    piece = torch.arange(len(lengths)).repeat_interleave(lengths)  # (tokens,), as are rows and segments
    rows = torch.tensor([row for row, span in enumerate(spans) for _ in span])[piece]
    segments = torch.tensor([segment for span in spans for segment in range(len(span))])[piece]
    prompt_end = torch.tensor([span[0] for span in spans]) + torch.tensor([0, *map(sum, spans[:-1])]).cumsum(0)
    some, full = _visible_blocks(piece, rows, segments, prompt_end)

    row, segment = rows.to(device, torch.int32), segments.to(device, torch.int32)

    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (segment[key] == 0) | (segment[key] == segment[query])
        return (key <= query) & (row[key] == row[query]) & own

    return BlockMask.from_kv_blocks(
        *_ordered((some & ~full).to(device)),
        *_ordered(full.to(device)),  # blocks for which the kernel need not ask `visible`
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(len(piece), len(piece)),
    )


def _visible_blocks(
    piece: torch.Tensor, rows: torch.Tensor, segments: torch.Tensor, prompt_end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query blocks, key blocks) bool twice: where some query sees a key, and where all queries see all keys.

    Args:
        piece, rows, segments: (tokens,) which piece, row and segment a token belongs to; the first two never decrease.
        prompt_end: (rows,) position on the line behind the prompt.
    """
    first = torch.arange(0, len(piece), BLOCK)
    last = (first + BLOCK).clamp(max=len(piece)) - 1
    query, key = (slice(None), None), (None, slice(None))
    later = first[query] > first[key]
    # Of two different blocks, only the piece, and the row, that one ends with and the other begins with can be in both.
    same_piece = piece[first][query] == piece[last][key]
    sees_prompt = (rows[first][query] == rows[last][key]) & (prompt_end[rows[last]] > first)[key]
    some = torch.eye(len(first), dtype=torch.bool) | (later & (same_piece | sees_prompt))
    # All keys are seen that belong to the prompt of the one row of all queries, or to the one response of all queries.
    same_row = rows[last][query] == rows[first][key]
    one_response = (segments[last] <= segments[first].clamp(min=1))[key]
    all_keys = (segments[last] == 0)[key] | (one_response & (piece[last][query] == piece[last][key]))
    whole = (last - first == BLOCK - 1)[query]  # what lies behind the line's end is for the mask to hide
    return some, later & whole & same_row & all_keys


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """BlockMask's form of a table: (1, 1, query blocks) key blocks that count, and (1, 1, query blocks, key blocks) int32
    their numbers, followed by those of the others."""
    number = blocks.sum(dim=-1, dtype=torch.int32)
    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return number[None, None], order[None, None]


def flex_packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface.

    A sliding window is left alone: it is no shorter than any row, or the layout is not chosen.

    Args:
        query: (1, heads, tokens, width).
        key, value: (1, key heads, tokens, width).
        attention_mask: from :func:`block_mask`; anything else is SDPA attention's.

    Returns:
        (1, tokens, heads, width), and no attention weights.

    Raises:
        NotImplementedError: for what the kernel is not used for: dropout, a soft cap of attention scores.
    """
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise NotImplementedError("FlexAttention has no dropout; set attention_dropout to 0 in the model's configuration")
    if kwargs.get("softcap") is not None:
        # A score_mod would do it, but next to a block mask it has made NaN gradients at lengths that are no multiple of 128
        # (pytorch issue 153799), and SDPA attention, to which generation falls back, has no soft cap.
        raise NotImplementedError("rows are not packed for models with a soft cap of attention scores")
    attend: Any = compiled() if query.is_cuda else flex_attention
    output = attend(
        query,
        key,
        value,
        block_mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        # Left to itself, a line below 128 tokens takes a kernel of its own: one more to compile, and to prove.
        kernel_options={"BACKEND": "TRITON"} if query.is_cuda else None,
    )
    return output.transpose(1, 2), None


def compiled() -> Callable[..., torch.Tensor]:
    """FlexAttention compiled for lines of any length; the compiler runs when it is first called.

    It runs again without gradients, where not all of query, key and value have one, and for lines of a single block, so some
    six times; never for a length alone, save once where the first line had as many blocks as there are heads. Beyond torch's
    limit ``fullgraph`` makes it an error: the alternative is attention that holds all scores of a line, without a word.
    """
    if torch._dynamo.config.recompile_limit < 32:  # 8, in each thread by itself: layers may run again in autograd's
        torch._dynamo.config.recompile_limit = 32
    return _compiled()


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def kernel_error(*, heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error, of the output and the three gradients, on random numbers; NaN if any is.

    Raises:
        Exception: whatever keeps the kernel from being compiled or run on this device.
    """
    spans = ((70, 90, 30), (1, 150, 1), (201, 1, 60))  # 604 tokens, of several blocks and no multiple of one
    generator = torch.Generator().manual_seed(0)
    total = sum(map(sum, spans))
    draw = lambda number: torch.randn(1, total, number, width, generator=generator).to(device, dtype)  # noqa: E731
    # Heads come last but one in memory, as they do from a model's projections: the compiler tells the two apart.
    inputs, weights = [draw(number).transpose(1, 2) for number in (heads, key_heads, key_heads)], draw(heads)
    mask, results = block_mask(spans, device), []
    attends: list[Callable[..., tuple[torch.Tensor, None]]] = [
        _dense_attention,
        partial(flex_packed_attention, torch.nn.Module()),
    ]
    for attend in attends:
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = attend(*leaves, mask)[0]
        gradients = torch.autograd.grad(output, leaves, weights.to(output.dtype))
        results.append([x.detach().double() for x in (output, *gradients)])
    return float(torch.stack([(got - wanted).norm() / wanted.norm() for wanted, got in zip(*results, strict=True)]).max())


def _dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask) -> tuple[torch.Tensor, None]:
    """:func:`flex_packed_attention` by definition, in float32."""
    groups, index = query.shape[1] // key.shape[1], torch.arange(query.shape[2], device=query.device)
    key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    seen = mask.mask_mod(index, index, index[:, None], index[None, :])
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(NAME, flex_packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
