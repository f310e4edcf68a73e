"""What a forward and backward pass need not do: the last layer where nobody reads it, and a second look at small operations.

Both work in place on whatever transformers model is loaded. ``lifealign.models.policy`` compares log-probabilities with and
without on a short probe, the adapter still zero, and takes back what changes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import MethodType, ModuleType
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from lifealign.kernels import product


class ReadPositions:
    """Inside ``only(positions)`` the last layer of a decoder is computed for these positions alone.

    Its keys and values are needed everywhere; its queries, its output projection and its feed-forward network only where the
    hidden state is read, so these see the positions that are and leave 0 elsewhere. With prompts half as long again as both
    responses that is 7 % of the products of an eight-layer body. An architecture that names its parts differently is left
    alone.
    """

    PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp")

    def __init__(self, decoder: nn.Module) -> None:
        self.enabled = True
        self._positions: torch.Tensor | None = None
        layers = getattr(decoder, "layers", None)
        self._layer = layers[-1] if layers else nn.Module()
        found = dict(self._layer.named_modules())
        for name in self.PARTS:
            if name in found:
                found[name].register_forward_pre_hook(self._select)
                found[name].register_forward_hook(self._spread)

    @contextmanager
    def only(self, positions: torch.Tensor) -> Iterator[None]:
        """``positions``: (read,) int64 into the flattened positions, each once."""
        # A checkpointed layer runs again in backward, when this is over, and must do what it did.
        runs_again = self._layer.training and getattr(self._layer, "gradient_checkpointing", False)
        self._positions = positions if self.enabled and not runs_again else None
        try:
            yield
        finally:
            self._positions = None

    def _select(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        if self._positions is None:
            return None
        (whole,) = inputs
        self._shape = whole.shape[:-1]
        return whole.flatten(0, -2)[self._positions].unsqueeze(0)

    def _spread(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self._positions is None:
            return None
        whole = output.new_zeros(self._shape.numel(), output.shape[-1])
        return whole.index_copy(0, self._positions, output[0]).view(*self._shape, -1)


def replace_small_operations(base: nn.Module) -> Callable[[], None]:
    """Give norms, frozen and LoRA layers and rotary positions a forward and backward of their own.

    They take fewer passes over memory than autograd's, and the faster of two matrix products.

    For CPUs, where it was measured; on a card these operations are a smaller share and have kernels of their own.

    Returns:
        What takes it back.
    """
    undo: list[Callable[[], None]] = []
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            forward = _norm_forward
        elif type(module) is lora.Linear and isinstance(module.base_layer, nn.Linear):
            forward = _lora_forward
        elif _is_frozen(module):
            forward = _linear_forward
        else:
            continue
        module.forward = MethodType(forward, module)
        undo.append(partial(delattr, module, "forward"))
    undo += _replace_rotary(sys.modules[type(base).__module__])

    def take_back() -> None:
        for step in undo:
            step()

    return take_back


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_().div_(x.shape[-1])
        inverse = mean.add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed.to(x.dtype) * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        normed, inverse, weight = ctx.saved_tensors
        of_normed = (gradient * weight).to(normed.dtype)
        mean = torch.linalg.vecdot(of_normed, normed).div_(normed.shape[-1]).unsqueeze(-1)
        return of_normed.addcmul_(normed, mean, value=-1).mul_(inverse).to(gradient.dtype), None, None


def _norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + s · (x Aᵀ) Bᵀ for a frozen W, LoRA in its own dtype.

    Products with the short side of A and B come in two forms; the one written here is the faster on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        flat = x.flatten(0, -2)
        low = flat.to(a.dtype) @ a.T  # (tokens, r)
        output = product(flat, weight, bias)
        _add_product(output, low, b.T, scale)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale = scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        of_output = flat.to(b.dtype)
        of_low = (b.T @ of_output.T).mul_(ctx.scale)  # (r, tokens)
        grad_a, grad_b = of_low @ x.to(a.dtype), (low.T @ of_output).mul_(ctx.scale).T
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(flat, weight.T)
            _add_product(grad_x, of_low.T, a, 1.0)
            grad_x = grad_x.view(*gradient.shape[:-1], -1)
        return grad_x, None, None, grad_a, grad_b, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += scale · left right, rounded to the dtype of ``total`` once."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def _lora_forward(module: lora.Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's own forward for whatever is not a plain adapter in training: none, merged, several, dropout, variants."""
    names, base = module.active_adapters, module.base_layer
    if module.disable_adapters or module.merged or len(names) != 1 or args or kwargs or not _is_plain(module, names[0]):
        return lora.Linear.forward(module, x, *args, **kwargs)
    a, b = module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
    return _LoraLinear.apply(x, base.weight, base.bias, a, b, module.scaling[names[0]])


def _is_plain(module: lora.Linear, name: str) -> bool:
    """Whether an adapter is W + s · B A and nothing else, with weights that are not partitioned by ZeRO-3."""
    return (
        name in module.lora_A
        and isinstance(module.lora_dropout[name], nn.Identity)
        and name not in module.lora_variant
        and not module.lora_bias[name]
        and not hasattr(module.lora_A[name].weight, "ds_id")
    )


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + bias for a frozen W; x is (rows, inputs)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.T), None, None


def _linear_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    if not _is_frozen(module):  # any more
        return nn.Linear.forward(module, x)
    # Views are made outside, so that whoever called may change the output in place, as he could before.
    output = _FrozenLinear.apply(x.reshape(-1, module.in_features), module.weight, module.bias)
    return output.view(*x.shape[:-1], module.out_features)


def _is_frozen(module: Any) -> bool:
    """Whether it is a linear layer, with neither adapter nor quantisation, whose parameters are whole and not trained."""
    return type(module) is nn.Linear and not any(p.requires_grad or hasattr(p, "ds_id") for p in module.parameters())


class _Rotary(torch.autograd.Function):
    """x · cos + rotate_half(x) · sin, where rotate_half((a, b)) = (-b, a) over the halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        rotated = x * cos
        (a, b), (sin_a, sin_b), (to_a, to_b) = (t.chunk(2, -1) for t in (x, sin, rotated))
        to_a.addcmul_(b, sin_a, value=-1)
        to_b.addcmul_(a, sin_b)
        return rotated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad_x = gradient * cos
        (of_a, of_b), (sin_a, sin_b), (to_a, to_b) = (t.chunk(2, -1) for t in (gradient, sin, grad_x))
        to_a.addcmul_(of_b, sin_b)
        to_b.addcmul_(of_a, sin_a, value=-1)
        return grad_x, None, None


def _replace_rotary(modeling: ModuleType) -> list[Callable[[], None]]:
    """Replace the function that rotates queries and keys; returns what takes that back.

    It belongs to the module of an architecture and so to all models of it in this process. What takes its place therefore
    gives the same numbers, and leaves to it any call of another form.
    """
    name = "apply_rotary_pos_emb"
    own = getattr(modeling, name, None)
    if hasattr(own, "__wrapped__"):  # by a model before this one; what it did can be taken back here too
        return [partial(setattr, modeling, name, own.__wrapped__)]
    if own is None or not _rotates_halves(own):
        return []

    @wraps(own)
    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alike = q.ndim == 4 and cos.ndim == 3 and q.shape[-1] == cos.shape[-1] and q.dtype == k.dtype == cos.dtype
        if args or kwargs or not alike or q.device.type != "cpu" or cos.requires_grad:
            return own(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)

    setattr(modeling, name, rotate)
    return [partial(setattr, modeling, name, own)]


def _rotates_halves(function: Callable[..., Any]) -> bool:
    """Whether a function of queries, keys, cosines and sines does what ``_Rotary`` does; some interleave, for instance."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8)))
    try:
        pairs = zip(function(q, k, cos, sin), (q, k), strict=True)
        return all(torch.allclose(got, _Rotary.apply(x, cos.unsqueeze(1), sin.unsqueeze(1)), atol=1e-5) for got, x in pairs)
    except Exception:  # of another signature
        return False
