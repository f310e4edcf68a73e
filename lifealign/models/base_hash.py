"""The hash of a base: of everything that its log-probabilities of given token ids depend on."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch import nn

from lifealign.models.policy import Policy, gathered
from lifealign.models.quantization import quantised_tensors
from lifealign.runtime import distributed

FORMAT = 1
"""Raised when the code comes to compute other log-probabilities, beyond rounding, from the same weights and tokens."""

AT_ONCE = 4
"""Tensors that are hashed, and so stand whole in memory, at one time."""

IRRELEVANT = ("_name_or_path", "transformers_version", "use_cache")
"""Keys of a model's configuration that say where it came from or how it runs, and not what it computes."""


@torch.no_grad()
def base_hash(policy: Policy) -> str:
    """64 hexadecimal digits, the same on every rank, under every ZeRO stage and whatever adapter is on the base.

    Call on every rank: a partitioned base (ZeRO-3) is gathered tensor by tensor, and rank 0 hashes.
    """
    config = _relevant(policy.base.config.to_dict())
    facts = [FORMAT, transformers.__version__, config, str(policy.dtype), distributed.device().type]
    digests: list[tuple[str, Future[str]]] = []
    running: deque[Future[str]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:  # hashlib lets go of Python's lock
        for name, tensor in _base_tensors(policy.base):
            with gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
                if not distributed.is_main():
                    continue
                if len(running) == AT_ONCE:
                    running.popleft().result()
                whole = tensor.detach().cpu()
                # What ZeRO-3 has gathered it takes back on leaving, while the thread still reads.
                running.append(pool.submit(_tensor_hash, whole.clone() if hasattr(tensor, "ds_id") else whole))
                digests.append((name, running[-1]))
    facts += sorted((name, digest.result()) for name, digest in digests)
    outcome = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return distributed.broadcast_object(outcome)


def _base_tensors(base: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, tied ones once, what belongs to quantised ones, and buffers that a checkpoint would hold, under the names
    they have without an adapter."""
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            yield plain, parameter
            yield from quantised_tensors(plain, parameter)
    for place, module in base.named_modules():
        for name, buffer in module.named_buffers(place, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set and "lora_" not in name:
                yield name.replace(".base_layer.", "."), buffer


def _tensor_hash(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _relevant(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    kept = (key for key in config if key not in IRRELEVANT and "attn_implementation" not in str(key))
    return {str(key): _relevant(config[key]) for key in kept}
