"""Batched greedy generation, spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lifealign.data.batch import length_buckets
from lifealign.models.adapter import merged
from lifealign.models.loading import pad_token_id
from lifealign.models.policy import Policy
from lifealign.runtime import distributed


@torch.no_grad()
def generate(
    module: nn.Module,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The policy's greedy answer to each prompt, as text, on every rank.

    Batches hold prompts of like length, padded on the left, and go to ranks in turn; every rank generates equally often
    (see :func:`lifealign.models.scoring.score_pairs`).
    """
    buckets = list(length_buckets([len(p) for p in prompts], batch_size))
    world = distributed.world_size()
    was_training = module.training
    module.eval()
    mine: dict[int, str] = {}
    with merged(policy.model):  # measured to be faster: a decoded token pays for every small product of the adapter
        for start in range(0, len(buckets), world):
            number = start + distributed.rank()
            bucket = buckets[min(number, len(buckets) - 1)]
            texts = _generate_batch(policy, [prompts[i] for i in bucket], tokenizer, max_new_tokens)
            if number < len(buckets):
                mine |= zip(bucket, texts, strict=True)
    module.train(was_training)
    everywhere = {i: text for share in distributed.gather_objects(mine) for i, text in share.items()}
    return [everywhere[i] for i in range(len(prompts))]


def _generate_batch(
    policy: Policy, prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[str]:
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad_token_id(tokenizer))
    mask = torch.zeros_like(ids)
    for line, prompt in enumerate(prompts):
        ids[line, length - len(prompt) :] = torch.tensor(prompt)
        mask[line, length - len(prompt) :] = 1
    output = policy.model.generate(
        input_ids=ids.to(distributed.device()),
        attention_mask=mask.to(distributed.device()),
        generation_config=_greedy(policy, tokenizer, max_new_tokens),
        # A partitioned model can only be called by all ranks at once: none may stop before the others.
        synced_gpus=hasattr(next(policy.parameters()), "ds_id"),
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, length:].cpu(), skip_special_tokens=True)]


def _greedy(policy: Policy, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that stops where the model's own configuration says a reply ends."""
    own = policy.base.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else []
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}),
        pad_token_id=pad_token_id(tokenizer),
        use_cache=True,
    )
