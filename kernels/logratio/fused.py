"""Triton implementation: logits exist one tile at a time, in registers, and are never written to memory.

One chunk of tokens takes four kernels:

1. :func:`_vocabulary_tile_kernel`, a matrix product whose epilogue keeps of a tile of logits (tokens × vocabulary tile)
   its log-sum-exp, the logit of the target if it lies there, and, where ``hidden`` needs a gradient, the softmax *within
   the tile* in the dtype of ``hidden``;
2. :func:`_merge_kernel`, the online log-sum-exp over the tiles, and with it each token's log-probability;
3. :func:`_logit_gradient_kernel`, which turns tile softmaxes into d logp / d logits in place: p is the tile softmax times
   exp(tile lse − lse), one factor a token and tile;
4. :func:`_unit_gradient_kernel`, a second pass over the vocabulary tiles: that gradient times W, (tokens, d).

The tile softmaxes of a chunk are the price for computing the logits once (4·V·d operations a token, where recomputing
them in the second pass would make it 6·V·d); ``SCRATCH_BYTES`` bounds them. Without a gradient there are none.

The one-hot of the target enters in step 3 as 1 − p_y = −expm1(logp), in float32: taken from a rounded p_y it would be noise
wherever the model is sure of the target, and that is most tokens. Nothing uses atomics, so the same call gives the same bits;
the sum over the tokens of a sequence is one program a sequence, in float64 and in the order of the tokens.

Triton takes annotations of kernel parameters for types, so those of tensors stay bare; shapes are in the docstrings.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from .chunked import _head_gradients

SCRATCH_BYTES = 384 << 20  # tile softmaxes held at once; 1,280 tokens of a vocabulary of 151,936 in bfloat16
FORWARD_ROWS = 4096  # tokens a chunk without gradient: their hidden states stay in a Hopper card's L2
ROW_MULTIPLE = 128  # largest BLOCK_T
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The number of tokens is another at every step: no kernel is compiled anew where it is 1 or a multiple of 16.
_jit = partial(triton.jit, do_not_specialize=["tokens", "token_bucket"])


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, INTERPRETER: tl.constexpr):
    """x (float32) to the nearest DTYPE; the interpreter cuts bfloat16 off, so there the last bits are rounded first."""
    if INTERPRETER and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _capped(z, softcap):
    """softcap · tanh(z / softcap), for z = ±inf too."""
    t = tl.exp(-2 * tl.abs(z / softcap))
    return tl.where(z < 0, -softcap, softcap) * ((1 - t) / (1 + t))


@_jit
def _vocabulary_tile_kernel(
    hidden,
    weight,
    bias,
    targets,
    target_logits,
    tile_lses,
    tile_probs,
    tokens,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    probs_stride,
    softcap,
    token_bucket,  # read by the tuner alone
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
    SCALE: tl.constexpr,
    INTERPRETER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of logits, hidden (tokens, width) @ weight (vocab, width)ᵀ.

    Writes tile_lses (tiles, tokens), target_logits (tokens,) where the target lies in the tile, and with KEEP tile_probs
    (tokens, tiles · BLOCK_V): softmax within the tile, times the slope of the soft cap, times SCALE; 0 beyond the vocabulary.
    """
    # Programs that run together share a tile of the weight: all tokens of the chunk come before the next tile.
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    tile = tl.program_id(0) // token_blocks
    t = tl.program_id(0) % token_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    h_pointers = hidden + t[:, None].to(tl.int64) * hidden_stride + d[None, :]
    w_pointers = weight + v[None, :].to(tl.int64) * weight_stride + d[:, None]
    z = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        h = tl.load(h_pointers, mask=(t[:, None] < tokens) & (d[None, :] < width - start), other=0.0)
        w = tl.load(w_pointers, mask=(v[None, :] < vocab) & (d[:, None] < width - start), other=0.0)
        if INTERPRETER:  # it would multiply the bit patterns of bfloat16; the product of two is exact in float32
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision="ieee")  # float32 must not become tf32
        h_pointers += BLOCK_D
        w_pointers += BLOCK_D
    if HAS_BIAS:
        z += tl.load(bias + v, mask=v < vocab, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = _capped(z, softcap)
    z = tl.where(v[None, :] < vocab, z, float("-inf"))

    top = tl.max(z, 1)
    top = tl.where(top == float("-inf"), 0.0, top)  # a bias of -inf may forbid a whole tile
    lse = top + tl.log(tl.sum(tl.exp(z - top[:, None]), 1))
    tl.store(tile_lses + tile.to(tl.int64) * tokens + t, lse, mask=t < tokens)

    y = tl.load(targets + t, mask=t < tokens, other=-1)
    target_logit = tl.sum(tl.where(v[None, :] == y[:, None], z, 0.0), 1)
    here = (y >= tile * BLOCK_V) & (y < tl.minimum((tile + 1) * BLOCK_V, vocab))
    tl.store(target_logits + t, target_logit, mask=here)

    if KEEP:
        probs = tl.exp(z - tl.where(lse == float("-inf"), 0.0, lse)[:, None]) * SCALE
        if HAS_SOFTCAP:
            ratio = tl.where(v[None, :] < vocab, z, 0.0) / softcap
            probs *= 1 - ratio * ratio
        p_pointers = tile_probs + t[:, None].to(tl.int64) * probs_stride + v[None, :]
        tl.store(p_pointers, _rounded(probs, tile_probs.dtype.element_ty, INTERPRETER), mask=t[:, None] < tokens)


@_jit
def _merge_kernel(tile_lses, target_logits, lses, logps, tokens, tiles, BLOCK_T: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """Online log-sum-exp over tile_lses (tiles, tokens): lses (tokens,), logps (tokens,) = target_logits − lses."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    top = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        pointers = tile_lses + tile[:, None].to(tl.int64) * tokens + t[None, :]
        x = tl.load(pointers, mask=(tile[:, None] < tiles) & (t[None, :] < tokens), other=0.0)
        x = tl.where(tile[:, None] < tiles, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[None, :]), 0)
        top = higher
    lse = top + tl.log(total)
    logp = tl.load(target_logits + t, mask=t < tokens, other=0.0) - lse
    tl.store(lses + t, lse, mask=t < tokens)
    tl.store(logps + t, logp, mask=t < tokens)


@_jit
def _logit_gradient_kernel(
    tile_probs,
    targets,
    target_logits,
    tile_lses,
    lses,
    logps,
    tokens,
    probs_stride,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    SCALE: tl.constexpr,
    INTERPRETER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """tile_probs (tokens, tiles · BLOCK_V) becomes SCALE · d logp / d (uncapped logits), in place."""
    tile = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row = t < tokens
    share = tl.exp(
        tl.load(tile_lses + tile.to(tl.int64) * tokens + t, mask=row, other=0.0) - tl.load(lses + t, mask=row, other=0.0)
    )
    pointers = tile_probs + t[:, None].to(tl.int64) * probs_stride + v[None, :]
    gradient = -tl.load(pointers, mask=row[:, None], other=0.0).to(tl.float32) * share[:, None]

    logp = tl.load(logps + t, mask=row, other=0.0)
    # 1 − p_y = −expm1(logp): by its series near 0, where 1 − exp(logp) cancels.
    at_target = tl.where(logp > -0.01, -logp * (1 + logp / 2 * (1 + logp / 3)), 1 - tl.exp(logp)) * SCALE
    if HAS_SOFTCAP:
        ratio = tl.load(target_logits + t, mask=row, other=0.0) / softcap
        at_target *= 1 - ratio * ratio
    y = tl.load(targets + t, mask=row, other=-1)
    gradient = tl.where(v[None, :] == y[:, None], at_target[:, None], gradient)
    tl.store(pointers, _rounded(gradient, tile_probs.dtype.element_ty, INTERPRETER), mask=row[:, None])


@_jit
def _unit_gradient_kernel(
    logit_gradient,
    weight,
    unit,
    tokens,
    vocab,
    width,
    gradient_stride,
    weight_stride,
    unit_stride,
    token_bucket,  # read by the tuner alone
    SCALE: tl.constexpr,
    INTERPRETER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """unit (tokens, width) = logit_gradient (tokens, ≥ vocab) @ weight (vocab, width) / SCALE.

    The columns of logit_gradient run to a multiple of BLOCK_K and hold 0 beyond the vocabulary.
    """
    # Programs that run together walk through the vocabulary side by side, so both operands are read from L2.
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    t = tl.program_id(0) % token_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) // token_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    g_pointers = logit_gradient + t[:, None].to(tl.int64) * gradient_stride + k[None, :]
    w_pointers = weight + k[:, None].to(tl.int64) * weight_stride + d[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(0, vocab, BLOCK_K):
        g = tl.load(g_pointers, mask=t[:, None] < tokens, other=0.0)
        w = tl.load(w_pointers, mask=(k[:, None] < vocab - start) & (d[None, :] < width), other=0.0)
        if INTERPRETER:
            g = g.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(g, w, total, input_precision="ieee")
        g_pointers += BLOCK_K
        w_pointers += BLOCK_K * weight_stride
    pointers = unit + t[:, None].to(tl.int64) * unit_stride + d[None, :]
    total = _rounded(total / SCALE, unit.dtype.element_ty, INTERPRETER)
    tl.store(pointers, total, mask=(t[:, None] < tokens) & (d[None, :] < width))


@_jit
def _segment_sum_kernel(token_logps, sequence_ids, logps, tokens, BLOCK: tl.constexpr):
    """logps[s] (num_sequences,) = sum of token_logps (tokens,) where sequence_ids (tokens,) is s = program; in float64."""
    s = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, tokens, BLOCK):
        t = start + tl.arange(0, BLOCK)
        mine = tl.load(sequence_ids + t, mask=t < tokens, other=-1) == s
        total += tl.load(token_logps + t, mask=mine, other=0.0).to(tl.float64)
    tl.store(logps + s, tl.sum(total, 0).to(tl.float32))


@_jit
def _scale_rows_kernel(
    unit,
    sequence_ids,
    grad_logps,
    grad_hidden,
    tokens,
    width,
    INTERPRETER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_hidden (tokens, width) = unit (tokens, width) · grad_logps[sequence_ids], rounded once."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    scale = tl.load(grad_logps + tl.load(sequence_ids + t, mask=t < tokens, other=0), mask=t < tokens, other=0.0)
    offsets = t[:, None].to(tl.int64) * width + d[None, :]
    mask = (t[:, None] < tokens) & (d[None, :] < width)
    rows = tl.load(unit + offsets, mask=mask, other=0.0).to(tl.float32) * scale[:, None].to(tl.float32)
    tl.store(grad_hidden + offsets, _rounded(rows, grad_hidden.dtype.element_ty, INTERPRETER), mask=mask)


# Kernels of this module and of the library must agree: the variable has no effect on a triton imported before it was set.
INTERPRETED = not isinstance(_merge_kernel, triton.JITFunction) and not isinstance(tl.sum, triton.JITFunction)


def _configs(*options: tuple[dict[str, int], int, int]) -> list[triton.Config]:
    return [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in options]


# BLOCK_V is fixed by the caller, for it decides the shape of tile_lses.
_TILE_CONFIGS = {
    True: _configs(
        ({"BLOCK_T": 128, "BLOCK_D": 64}, 8, 4),
        ({"BLOCK_T": 128, "BLOCK_D": 64}, 8, 3),
        ({"BLOCK_T": 64, "BLOCK_D": 64}, 8, 3),
        ({"BLOCK_T": 32, "BLOCK_D": 64}, 8, 3),  # this and the next fit the 99 KiB of cards that are not for servers
        ({"BLOCK_T": 64, "BLOCK_D": 32}, 8, 3),
    ),
    False: _configs(
        ({"BLOCK_T": 64, "BLOCK_D": 32}, 4, 3),
        ({"BLOCK_T": 64, "BLOCK_D": 16}, 8, 3),
        ({"BLOCK_T": 32, "BLOCK_D": 32}, 4, 2),
    ),
}
_UNIT_CONFIGS = {
    True: _configs(
        ({"BLOCK_T": 128, "BLOCK_D": 256, "BLOCK_K": 64}, 8, 4),
        ({"BLOCK_T": 128, "BLOCK_D": 128, "BLOCK_K": 64}, 8, 4),
        ({"BLOCK_T": 128, "BLOCK_D": 128, "BLOCK_K": 64}, 4, 4),
        ({"BLOCK_T": 64, "BLOCK_D": 128, "BLOCK_K": 64}, 4, 4),
        ({"BLOCK_T": 64, "BLOCK_D": 64, "BLOCK_K": 128}, 4, 3),
    ),
    False: _configs(
        ({"BLOCK_T": 64, "BLOCK_D": 64, "BLOCK_K": 32}, 4, 3),
        ({"BLOCK_T": 64, "BLOCK_D": 64, "BLOCK_K": 16}, 8, 3),
        ({"BLOCK_T": 32, "BLOCK_D": 32, "BLOCK_K": 32}, 4, 2),
    ),
}
if INTERPRETED:  # a program costs about 5 ms of Python there: few tiles, yet several in each direction at the tests' sizes
    _TILE_BLOCKS = {"BLOCK_T": 128, "BLOCK_D": 32}
    _UNIT_BLOCKS = {"BLOCK_T": 128, "BLOCK_D": 64}
    _tile_kernels = dict.fromkeys((True, False), _vocabulary_tile_kernel)
    _unit_kernels = dict.fromkeys((True, False), _unit_gradient_kernel)
else:
    _TILE_BLOCKS = _UNIT_BLOCKS = {}
    # Timings are cached on disk beside the compiled kernels: a second run does not tune, and chooses the same tiles.
    _tuned = partial(triton.autotune, cache_results=True)
    _keys = ["vocab", "width", "token_bucket"]
    _tile_kernels = {
        half: _tuned(configs, key=[*_keys, "KEEP", "HAS_SOFTCAP"])(_vocabulary_tile_kernel)
        for half, configs in _TILE_CONFIGS.items()
    }
    _unit_kernels = {half: _tuned(configs, key=_keys)(_unit_gradient_kernel) for half, configs in _UNIT_CONFIGS.items()}


def _block_v(half: bool, vocab: int) -> int:
    """Words a tile: at 256 the accumulator takes 128 registers a thread; float32 has no tensor cores to feed."""
    if INTERPRETED:
        return 1024 if vocab > 4096 else 32
    return 256 if half else 64


def _chunk_rows(tokens: int, row_bytes: int | None) -> int:
    """Tokens a chunk: equal chunks, none of them over SCRATCH_BYTES (FORWARD_ROWS where nothing is kept)."""
    most = FORWARD_ROWS if row_bytes is None else max(ROW_MULTIPLE, SCRATCH_BYTES // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    return triton.cdiv(triton.cdiv(tokens, triton.cdiv(tokens, most)), ROW_MULTIPLE) * ROW_MULTIPLE


def _token_bucket(tokens: int) -> int:
    """What the tuner sees of the number of tokens: the best tiles of a start-up check are not those of a step."""
    return 0 if tokens <= 64 else 1 if tokens <= 512 else 2


class _Head:
    """The head of one call and what its kernels have in common."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, *, keep: bool) -> None:
        self.weight, self.bias, self.softcap, self.keep = weight, bias, softcap, keep
        self.half = weight.dtype != torch.float32
        self.block_v = _block_v(self.half, weight.shape[0])
        self.tiles = triton.cdiv(weight.shape[0], self.block_v)
        # float16 ends at 6e-8, and 150,000 words of 3e-8 each are half a percent of the mass: weights are kept times 2^14.
        self.scale = 16384.0 if weight.dtype == torch.float16 else 1.0

    def scratch(self, rows: int) -> torch.Tensor:
        """(rows, tiles · block_v) room for tile softmaxes; a single element where none are kept."""
        return self.weight.new_empty((rows, self.tiles * self.block_v) if self.keep else (1, 1))

    def token_logps(
        self, hidden: torch.Tensor, targets: torch.Tensor, logps: torch.Tensor, scratch: torch.Tensor, unit: torch.Tensor | None
    ) -> None:
        """Fills logps (n,) and unit (n, d) of hidden (n, d), targets (n,); scratch holds at least n rows."""
        tokens, width = hidden.shape
        vocab = self.weight.shape[0]
        softcap = self.softcap or 1.0
        tile_lses = logps.new_empty(self.tiles, tokens)
        target_logits = torch.full_like(logps, float("nan"))  # stays NaN for a target outside the vocabulary
        lses = torch.empty_like(logps)
        bucket = _token_bucket(tokens)
        common: dict[str, Any] = {
            "SCALE": self.scale,
            "HAS_SOFTCAP": self.softcap is not None,
            "INTERPRETER": INTERPRETED,
            "BLOCK_V": self.block_v,
        }
        _tile_kernels[self.half][lambda meta: (triton.cdiv(tokens, meta["BLOCK_T"]) * self.tiles,)](
            hidden,
            self.weight,
            self.weight if self.bias is None else self.bias,
            targets,
            target_logits,
            tile_lses,
            scratch,
            tokens,
            vocab,
            width,
            hidden.stride(0),
            self.weight.stride(0),
            scratch.stride(0),
            softcap,
            bucket,
            HAS_BIAS=self.bias is not None,
            KEEP=self.keep,
            **common,
            **_TILE_BLOCKS,
        )
        _merge_kernel[(triton.cdiv(tokens, 32),)](
            tile_lses, target_logits, lses, logps, tokens, self.tiles, BLOCK_T=32, BLOCK_TILES=64
        )
        if unit is None:
            return
        rows = 128 if INTERPRETED else 8
        _logit_gradient_kernel[(triton.cdiv(tokens, rows), self.tiles)](
            scratch, targets, target_logits, tile_lses, lses, logps, tokens, scratch.stride(0), softcap, BLOCK_T=rows, **common
        )
        _unit_kernels[self.half][lambda meta: (triton.cdiv(tokens, meta["BLOCK_T"]) * triton.cdiv(width, meta["BLOCK_D"]),)](
            scratch,
            self.weight,
            unit,
            tokens,
            vocab,
            width,
            scratch.stride(0),
            self.weight.stride(0),
            unit.stride(0),
            bucket,
            SCALE=self.scale,
            INTERPRETER=INTERPRETED,
            **(_UNIT_BLOCKS | {"BLOCK_K": self.block_v} if INTERPRETED else {}),
        )


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        sequence_ids: torch.Tensor,
        num_sequences: int,
        bias: torch.Tensor | None,
        softcap: float | None,
        keep: bool,
    ) -> torch.Tensor:
        tokens = len(targets)
        token_logps = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        unit = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if keep else None
        if tokens:
            head = _Head(weight, bias, softcap, keep=keep)
            rows = _chunk_rows(tokens, head.tiles * head.block_v * weight.element_size() if keep else None)
            scratch = head.scratch(min(rows, tokens))
            for start in range(0, tokens, rows):
                piece = slice(start, start + rows)
                head.token_logps(
                    hidden[piece], targets[piece], token_logps[piece], scratch, None if unit is None else unit[piece]
                )
        ctx.softcap = softcap
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[5]
        ctx.save_for_backward(unit, targets, sequence_ids, *((hidden, weight, bias) if trains_head else (None,) * 3))
        return segment_sum(token_logps, sequence_ids, num_sequences)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        unit, targets, sequence_ids, hidden, weight, bias = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        if unit is not None:
            grad_hidden = _scaled_rows(unit, sequence_ids, grad_logps.contiguous())
        if hidden is not None:
            scale = grad_logps[sequence_ids]
            grad_weight, grad_bias = _head_gradients(hidden, weight, targets, bias, ctx.softcap, scale)
        return grad_hidden, grad_weight, None, None, None, grad_bias, None, None


def _scaled_rows(unit: torch.Tensor, sequence_ids: torch.Tensor, grad_logps: torch.Tensor) -> torch.Tensor:
    """(tokens, d) gradient of hidden: unit (tokens, d) times grad_logps (num_sequences,) of the token's sequence."""
    tokens, width = unit.shape
    grad_hidden = torch.empty_like(unit)
    rows, columns = (128, 64) if INTERPRETED else (8, 256)
    if tokens:
        _scale_rows_kernel[triton.cdiv(tokens, rows), triton.cdiv(width, columns)](
            unit, sequence_ids, grad_logps, grad_hidden, tokens, width, INTERPRETED, rows, columns
        )
    return grad_hidden


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def segment_sum(token_logps: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """(num_sequences,) float32 sums of token_logps (tokens,), taken in float64 and in a fixed order.

    Every program reads all ids: 12 bytes a token and sequence out of L2, against sorting or float atomics.
    """
    logps = token_logps.new_empty(num_sequences)
    if num_sequences:
        _segment_sum_kernel[(num_sequences,)](token_logps, sequence_ids, logps, len(token_logps), BLOCK=1024)
    return logps


def check_device(device: torch.device) -> None:
    """Raises ValueError where Triton kernels cannot run on the device."""
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"impl='triton' runs on CUDA devices; for tensors on {device.type} set TRITON_INTERPRET=1 before triton is "
            "imported (slow, for tests) or use impl='chunked'"
        )


def triton_sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_sequences: int,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See :func:`lifealign.kernels.sequence_logps`. Raises ValueError for a device or a dtype that it does not support."""
    check_device(hidden.device)
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"impl='triton' takes hidden and weight in one of float32, bfloat16 and float16, got {hidden.dtype} and "
            f"{weight.dtype}; use impl='chunked' or impl='reference' for float64"
        )
    keep = hidden.requires_grad and torch.is_grad_enabled()
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    bias = bias if bias is None else bias.contiguous()
    targets, sequence_ids = targets.contiguous(), sequence_ids.contiguous()
    with on_device(hidden.device):
        return _SequenceLogps.apply(hidden, weight, targets, sequence_ids, num_sequences, bias, softcap, keep)
