"""A frozen base in 4 bits (QLoRA), by the bitsandbytes package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lifealign.errors import UserError
from lifealign.models.options import ModelOptions, Quantization

BITS = 4.127
"""Of a weight: 4, and its share of the scales. A block of 64 has one of 8 bits, and 256 of these have one of 32 (Dettmers et
al. 2023, section 3)."""


def check_quantization(options: ModelOptions, zero_stage: int) -> None:
    """Raises UserError where a quantised base is asked for and cannot be had."""
    if options.quantization is Quantization.none:
        return
    asked = f"model.quantization={options.quantization.value}"
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{asked}: needs the package bitsandbytes; pip install 'lifealign[quantization]'")
    if zero_stage == 3:
        raise UserError(f"{asked}: does not go with zero=3, which partitions weights as they are read; take zero=0, 1 or 2")


def read_base(path: str, options: ModelOptions) -> PreTrainedModel:
    """A base as transformers reads it, its linear layers but the output head in 4 bits where that is asked for.

    Raises:
        UserError: where its files lack some of its weights, which the library would make up.
    """
    dtype = getattr(torch, options.dtype.value)
    asked = {}
    if options.quantization is not Quantization.none:
        asked["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.quantization.value,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    model, found = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        trust_remote_code=options.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        **asked,
    )
    missing = sorted({*found["missing_keys"], *(str(name) for name, *_ in found["mismatched_keys"])})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model.path={options.path}: its files lack the weights {missing[0]}{more}; take it from where it came")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs the first pass in eval mode would repack the weights for a kernel of its own and round their scales:
            # training would then go on from another base than the one that was scored.
            module.support_avx512bf16_for_cpu = False
    return model


def quantised_tensors(name: str, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """Scales and code of a parameter in 4 bits, which stand neither in parameters nor in buffers; nothing for another."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield from ((f"{name}.{key}", tensor) for key, tensor in state.as_dict(packed=True).items())
