"""Batched generation, greedy or sampled, spread over ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lifealign.data.batch import length_buckets
from lifealign.data.tokenize import end_of_turn
from lifealign.models.adapter import merged, read_added, read_factors
from lifealign.models.loading import pad_token_id
from lifealign.models.policy import Policy
from lifealign.runtime import distributed
from lifealign.runtime.signals import between_batches

UNCHANGED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""Samples are the policy's own: these would not be so by transformers' defaults."""


def generation_keys(
    policy: Policy, prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int
) -> list[str]:
    """What the greedy answer to each prompt depends on, on one base: 64 hexadecimal digits each. Call on every rank.

    A hash of the adapter and what is trained beside it, bit for bit, of the prompt's token ids, of how it is decoded (not by
    settings of the model's own, as once) and in which dtype.
    """
    adapter = hashlib.sha256()
    for name, value in sorted({**read_factors(policy.model), **read_added(policy)}.items()):
        adapter.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        adapter.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    decoding = {"max_new_tokens": max_new_tokens, "ends": _end_ids(policy, tokenizer), "prefix": policy.prefix, "own": False}
    shared = adapter.digest() + json.dumps({**decoding, "dtype": str(policy.dtype)}).encode()
    return [hashlib.sha256(shared + np.asarray(prompt, dtype=np.int64).tobytes()).hexdigest() for prompt in prompts]


def generate(
    module: nn.Module,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The policy's greedy answer to each prompt, as text, on every rank."""
    rows = _answers(module, policy, prompts, tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def sample(
    module: nn.Module,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
) -> list[list[int]]:
    """An answer to each prompt drawn from the policy itself (temperature 1, nothing cut off), as ids, on every rank.

    Each ends with its end token where it came to one. Draws are those of ``seed`` for any number of ranks.
    """
    rows = _answers(module, policy, prompts, tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed)
    ends = set(_end_ids(policy, tokenizer))
    lengths = (next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@torch.no_grad()
def _answers(
    module: nn.Module,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    seed: int | None = None,
) -> list[list[int]]:
    """The ids that follow each prompt, what fills up a batch after the end included; sampled where there is a seed.

    Batches hold prompts of like length, padded on the left, and go to ranks in turn; every rank generates equally often
    (see :func:`lifealign.models.scoring.score_pairs`).
    """
    prompts = [[*policy.prefix, *prompt] for prompt in prompts]
    buckets = list(length_buckets([len(p) for p in prompts], batch_size))
    world = distributed.world_size()
    was_training = module.training
    module.eval()
    mine: dict[int, list[int]] = {}
    config = _config(policy, tokenizer, max_new_tokens, sampled=seed is not None)
    # Merged, since a decoded token would pay for every small product of the adapter; measured to be faster.
    with _settings_aside(policy), merged(policy.model):
        for start in range(0, len(buckets), world):
            between_batches()
            number = min(start + distributed.rank(), len(buckets) - 1)
            bucket = buckets[number]
            with _seeded(None if seed is None else seed + number):
                rows = _generate_batch(policy, [prompts[i] for i in bucket], tokenizer, config)
            if start + distributed.rank() < len(buckets):
                mine |= zip(bucket, rows, strict=True)
    module.train(was_training)
    everywhere = {i: row for share in distributed.gather_objects(mine) for i, row in share.items()}
    return [everywhere[i] for i in range(len(prompts))]


@contextmanager
def _settings_aside(policy: Policy) -> Iterator[None]:
    """Inside, the model has no generation settings of its own, by which transformers would fill up those that are not given:
    a repetition penalty or beams, by which an answer is not the greedy one."""
    own = policy.base.generation_config
    policy.base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        policy.base.generation_config = own


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Inside, torch draws the numbers of a seed; afterwards it goes on as if nothing had been drawn. None: nothing is done."""
    if seed is None:
        yield
        return
    device = distributed.device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _generate_batch(
    policy: Policy, prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> list[list[int]]:
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad_token_id(tokenizer))
    mask = torch.zeros_like(ids)
    for line, prompt in enumerate(prompts):
        ids[line, length - len(prompt) :] = torch.tensor(prompt)
        mask[line, length - len(prompt) :] = 1
    output = policy.model.generate(
        input_ids=ids.to(distributed.device()),
        attention_mask=mask.to(distributed.device()),
        generation_config=config,
        # A partitioned model can only be called by all ranks at once: none may stop before the others.
        synced_gpus=hasattr(next(policy.parameters()), "ds_id"),
    )
    return output[:, length:].tolist()


def _config(policy: Policy, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, *, sampled: bool) -> GenerationConfig:
    """Decoding that stops where rows end, or the model's own configuration ends a reply; sampled: from the whole vocabulary."""
    return GenerationConfig(
        do_sample=sampled,
        **(UNCHANGED if sampled else {}),
        max_new_tokens=max_new_tokens,
        eos_token_id=_end_ids(policy, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        use_cache=True,
    )


def _end_ids(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = policy.base.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else []
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *(ends if isinstance(ends, list) else [ends])})
