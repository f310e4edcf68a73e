"""Generation with the adapter merged: the same answers, and afterwards the very weights that stood there before."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from support import compose_config
from torch import nn

from lifealign.assets import SIX_DOMAINS
from lifealign.config import Config, build
from lifealign.data.tasks import load_tasks
from lifealign.evaluation import generation
from lifealign.models.adapter import merged, named_factors, read_factors
from lifealign.models.loading import attach_lora, load_base, load_tokenizer
from lifealign.models.policy import Policy
from lifealign.runtime.engine import deepspeed_config

IDS = torch.arange(40).view(2, 20) + 5


def configured(dtype: str = "float32") -> Config:
    return build(compose_config("+sequence=six_domains", "sequence.tasks=[instruct,hc3]", f"model.dtype={dtype}"))


def adapted(dtype: str = "float32") -> Policy:
    """The bundled model with an adapter far from zero."""
    config = configured(dtype)
    model = attach_lora(load_base(config.model, deepspeed_config(config.zero)), config.model.lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, factor in named_factors(model):
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))
    return Policy(model.eval())


@pytest.fixture(scope="module")
def policy() -> Policy:
    return adapted()


def layers(policy: Policy) -> list[lora.Linear]:
    return [module for module in policy.modules() if isinstance(module, lora.Linear)]


def weights(policy: Policy) -> list[torch.Tensor]:
    """The adapted base weights, as they stand now."""
    return [layer.base_layer.weight.data for layer in layers(policy)]


def is_merged(policy: Policy) -> bool:
    return any(layer.merged for layer in layers(policy))


@torch.no_grad()
def log_probabilities(policy: Policy) -> torch.Tensor:
    return policy.model(input_ids=IDS).logits.log_softmax(-1)


def test_log_probabilities_are_those_of_the_adapter_beside_the_weights(policy: Policy) -> None:
    apart = log_probabilities(policy)
    with policy.without_adapter():
        assert (log_probabilities(policy) - apart).abs().max() > 0.1  # the adapter does something
    with merged(policy.model):
        assert all(layer.merged for layer in layers(policy))
        # Unlikely tokens stand at -20, where float32 alone is off by 1e-6 a rounding.
        torch.testing.assert_close(log_probabilities(policy), apart, atol=1e-5, rtol=1e-6)
    assert torch.equal(log_probabilities(policy), apart)


def test_generation_merges_and_says_the_same(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured()
    tokenizer = load_tokenizer(config.model)
    tasks = load_tasks(config.sequence, config.data, tokenizer, SIX_DOMAINS)
    prompts = [pair.prompt for task in tasks for pair in task.test[:6]]
    one_batch, seen = generation._generate_batch, []

    def watched(policy: Policy, *arguments: object) -> list[str]:
        seen.append(all(layer.merged for layer in layers(policy)))
        return one_batch(policy, *arguments)

    monkeypatch.setattr(generation, "_generate_batch", watched)
    answers = generation.generate(policy, policy, prompts, tokenizer, batch_size=4, max_new_tokens=16)
    assert seen == [True] * 3 and not is_merged(policy)
    monkeypatch.setattr(generation, "merged", lambda model: nullcontext())
    assert generation.generate(policy, policy, prompts, tokenizer, batch_size=4, max_new_tokens=16) == answers
    assert seen == [True] * 3 + [False] * 3
    with policy.without_adapter():
        assert generation.generate(policy, policy, prompts, tokenizer, batch_size=4, max_new_tokens=16) != answers


def test_greedy_is_greedy_whatever_the_model_brings(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instruct models ship settings, such as a repetition penalty, that transformers puts in where none are given."""
    config = configured()
    tokenizer = load_tokenizer(config.model)
    prompts = [p.prompt for p in load_tasks(config.sequence, config.data, tokenizer, SIX_DOMAINS)[0].test[:4]]
    answers = generation.generate(policy, policy, prompts, tokenizer, batch_size=4, max_new_tokens=16)
    monkeypatch.setattr(policy.base.generation_config, "repetition_penalty", 5.0)
    monkeypatch.setattr(policy.base.generation_config, "num_beams", 3)
    assert generation.generate(policy, policy, prompts, tokenizer, batch_size=4, max_new_tokens=16) == answers
    assert policy.base.generation_config.repetition_penalty == 5.0


def test_answers_end_where_rows_end(policy: Policy) -> None:
    """Of a base whose template ends turns with another token than its eos, as Qwen's do."""
    tokenizer = load_tokenizer(configured().model)
    end = tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token
    assert tokenizer.eos_token_id != end
    assert generation._end_ids(policy, tokenizer) == sorted({end, tokenizer.eos_token_id})
    policy.base.generation_config.eos_token_id, kept = None, policy.base.generation_config.eos_token_id
    try:
        assert generation._end_ids(policy, tokenizer) == sorted({end, tokenizer.eos_token_id})
    finally:
        policy.base.generation_config.eos_token_id = kept


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "exception"])
def test_the_very_weights_come_back(policy: Policy, fails: bool) -> None:
    before, copies, places = weights(policy), [w.clone() for w in weights(policy)], [w.data_ptr() for w in weights(policy)]
    factors = read_factors(policy.model)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), merged(policy.model):
        assert not any(torch.equal(now, w) for now, w in zip(weights(policy), before, strict=True))
        if fails:
            raise ZeroDivisionError
    assert [w.data_ptr() for w in weights(policy)] == places
    assert all(torch.equal(now, w) for now, w in zip(weights(policy), copies, strict=True))
    assert not is_merged(policy)
    assert all(torch.equal(p, factors[name]) for name, p in named_factors(policy.model))


def test_weights_come_back_where_merging_fails_half_way(policy: Policy) -> None:
    places = [w.data_ptr() for w in weights(policy)]
    last = layers(policy)[-1]
    scaling, last.scaling = last.scaling, {}
    with pytest.raises(KeyError), merged(policy.model):
        pass
    last.scaling = scaling
    assert [w.data_ptr() for w in weights(policy)] == places and not is_merged(policy)


def test_the_reference_inside_leaves_no_trace(policy: Policy) -> None:
    """PEFT unmerges by subtraction when a merged adapter is disabled; what it writes to is not the base's own tensor."""
    copies, places = [w.clone() for w in weights(policy)], [w.data_ptr() for w in weights(policy)]
    with merged(policy.model), merged(policy.model), policy.without_adapter():
        log_probabilities(policy)
    assert [w.data_ptr() for w in weights(policy)] == places and not is_merged(policy)
    assert all(torch.equal(now, w) for now, w in zip(weights(policy), copies, strict=True))


def test_a_bfloat16_base_is_left_unmerged() -> None:
    policy = adapted("bfloat16")
    places = [w.data_ptr() for w in weights(policy)]
    with merged(policy.model):
        assert [w.data_ptr() for w in weights(policy)] == places and not is_merged(policy)


def test_what_is_not_one_plain_adapter_is_left_unmerged() -> None:
    policy = adapted()
    model = policy.model
    with policy.without_adapter(), merged(model):
        assert not is_merged(policy)
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    with merged(model):
        assert not is_merged(policy)
    model.base_model.set_adapter("dora")
    with merged(model):
        assert not is_merged(policy)
    model.add_adapter("biased", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_bias=True))
    model.base_model.set_adapter("biased")
    with merged(model):
        assert not is_merged(policy)
    model.base_model.set_adapter([])
    with merged(model):
        assert not is_merged(policy)
    model.base_model.set_adapter("default")
    with merged(model):
        assert is_merged(policy)


def test_partitioned_weights_are_left_alone(policy: Policy) -> None:
    """What ZeRO-3 marks its parameters with is enough to keep the whole layer as it is."""
    marked: list[nn.Parameter] = [layer.base_layer.weight for layer in layers(policy)]
    for weight in marked:
        weight.ds_id = 0
    with merged(policy.model):
        assert not is_merged(policy)
    for weight in marked:
        del weight.ds_id
