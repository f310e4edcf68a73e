"""What a forward and backward pass need not do: the last layer where nobody reads it, and a second look at small operations.

Both work in place on whatever transformers model is loaded. ``lifealign.models.policy`` compares log-probabilities with and
without on a short probe, the adapter still zero, and takes back what changes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.nn.functional import linear


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


def replace_small_operations(base: nn.Module) -> list[Any]:
    """Give RMS norms and LoRA layers a backward of their own, with fewer passes over memory than autograd's.

    For CPUs, where it was measured; on a card these operations are a smaller share and have kernels of their own.

    Returns:
        The modules whose ``forward`` was replaced; deleting that attribute takes it back.
    """
    replaced: list[Any] = []
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_norm_forward, module)
        elif type(module) is lora.Linear and isinstance(module.base_layer, nn.Linear):
            module.forward = MethodType(_lora_forward, module)
        else:
            continue
        replaced.append(module)
    return replaced


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
        output = linear(flat, weight, bias)
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
            grad_x = flat @ weight
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
