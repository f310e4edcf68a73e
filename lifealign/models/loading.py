"""Load a base model and its tokenizer, and put a LoRA adapter on it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig

from lifealign.assets import TINY_MODEL
from lifealign.errors import UserError, did_you_mean
from lifealign.models.options import BaseDtype, LoraOptions, ModelOptions
from lifealign.models.quantization import check_quantization, read_base
from lifealign.runtime.terminal import console

log = logging.getLogger(__name__)

REPEATED = re.compile(r"layer|block|expert")
MOST_REPEATED, LARGEST_NUMBER = 1_000, 1 << 31
"""How many of its parts a model may be said to have, and the largest number otherwise: several times what any is known to have.
What is said to be larger would be built for hours, or until memory ends."""


def resolve_path(options: ModelOptions) -> str:
    """Where the base is loaded from: the bundled folder, a folder that exists, or a hub name."""
    if options.path == "bundled":
        return str(TINY_MODEL)
    looks_local = options.path.startswith((".", "/", "~")) or options.path.count("/") > 1
    path = Path(options.path).expanduser()
    if path.is_dir() or not looks_local:
        return str(path) if path.is_dir() else options.path
    raise UserError(f"model.path={options.path}: no such folder")


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The base's own tokenizer.

    Raises:
        UserError: where it cannot be loaded, or lacks a chat template or an end-of-sequence token.
    """
    check_model_config(options)  # which the library reads to find out which tokenizer it is
    path = resolve_path(options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # of a folder that holds anything: the library raises a dozen classes
        raise UserError(f"model.path={options.path}: no tokenizer could be loaded ({_reason(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer files
        raise UserError(f"model.path={options.path}: it holds no tokenizer; save the model's own beside the weights")
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path={options.path}: its tokenizer has no chat template; use an instruction-tuned model, or save "
            "the tokenizer with chat_template set"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={options.path}: its tokenizer has no end-of-sequence token; set eos_token and save it")
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills the end of a line; never predicted and never seen, so the end-of-sequence token will do."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_model_config(options: ModelOptions) -> None:
    """Look at the base's ``config.json`` before any library makes of it what it says.

    Raises:
        UserError: where it cannot be read, speaks of sizes that no model has, or asks for code that is not here.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(resolve_path(options))
        numbers = dict(_numbers(values))
    except UserError:
        raise
    except Exception as error:  # of a folder that holds anything: the libraries raise a dozen classes
        raise UserError(f"model.path={options.path}: no causal language model could be loaded ({_reason(error)})") from error
    for name, value in numbers.items():
        if abs(value) > (MOST_REPEATED if REPEATED.search(name) else LARGEST_NUMBER):
            raise UserError(f"model.path={options.path}: its config.json says {name}={value}; no model has that")
    attention = next((str(value) for name, value in values.items() if name.endswith("attn_implementation")), "")
    if "/" in attention and not options.trust_remote_code:  # the library would fetch it, and run it
        raise UserError(f"model.path={options.path}: its config.json asks for attention from {attention}; take that out")


def count_positions(options: ModelOptions) -> int | None:
    """How many tokens the base was made to read at once; None where its configuration does not say.

    Raises:
        UserError: where there is no configuration that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_path(options), trust_remote_code=options.trust_remote_code)
    except Exception as error:  # as above
        raise UserError(f"model.path={options.path}: no causal language model could be loaded ({_reason(error)})") from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def make_skeleton(options: ModelOptions) -> PreTrainedModel:
    """The base as its configuration says it is, with new weights; under ``torch.device("meta")`` with none.

    Raises:
        UserError: as :func:`load_base`.
    """
    check_model_config(options)
    trust = options.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(resolve_path(options), trust_remote_code=trust)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except Exception as error:  # as above
        raise UserError(f"model.path={options.path}: no causal language model could be made ({_reason(error)})") from error


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration, by its key; parts of a model have configurations within."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield name, value


def load_base(options: ModelOptions, deepspeed_config: dict[str, Any]) -> PreTrainedModel:
    """The frozen base. Under ZeRO-3 each weight is partitioned as it is read and never stands whole on every rank.

    Weights are read from safetensors only: the other format that such folders hold can carry code. Code that comes with a
    model is run where ``model.trust_remote_code`` says so, and a line says that it is.

    Raises:
        UserError: where there is no such model, its weights are not those of its configuration, all of them, or it cannot be
            held as ``model.quantization`` asks.
    """
    check_model_config(options)
    stage = deepspeed_config["zero_optimization"]["stage"]
    check_quantization(options, stage)
    if options.trust_remote_code:
        log.warning("model.trust_remote_code=true: code that comes with %s may run", options.path)
        console.print(f"model.trust_remote_code=true: code that comes with {options.path} may run", markup=False)
    # transformers looks for this object while it loads, and drops it again with the last reference. Without its bf16 section
    # DeepSpeed would make float32 of every weight that it partitions.
    bf16 = {"bf16": {"enabled": options.dtype is BaseDtype.bfloat16}}
    zero3 = HfDeepSpeedConfig({**deepspeed_config, **bf16}) if stage == 3 else None
    try:
        # The attention implementation is transformers' choice, SDPA where the architecture has it; choose_layout looks
        # at what it does.
        model = read_base(resolve_path(options), options)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"model.path={options.path}: no causal language model could be loaded ({_reason(error)})") from error
    del zero3
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def attach_lora(base: PreTrainedModel, options: LoraOptions, *, seed: int) -> PeftModel:
    """Put a fresh float32 LoRA adapter on a base: A drawn from ``seed``, B zero, so that the policy starts as the base.

    Raises:
        UserError: where a target matches no module, or is the output head.
    """
    _check_targets(base, options.target_modules)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config, autocast_adapter_dtype=True)


def _check_targets(base: PreTrainedModel, targets: list[str]) -> None:
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    endings = {name.rsplit(".", 1)[-1] for name in linear}
    head = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if module is base.get_output_embeddings()}
    for target in targets:
        if target in head:
            raise UserError(f"model.lora.target_modules: '{target}' is the output head, which stays frozen; remove it")
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise UserError(
                f"model.lora.target_modules: '{target}' matches no linear layer{did_you_mean(target, endings - head)}"
            )


def enable_gradient_checkpointing(model: PeftModel, *, zero_stage: int) -> None:
    """Recompute activations in backward. ZeRO-3 gathers parameters in hooks that only the re-entrant form runs again."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": zero_stage == 3})


def _reason(error: Exception) -> str:
    """What a library says of a folder, in one line; where it speaks of code, what to do about that."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in str(error) or "custom code" in text:
        return "it needs code that comes with it, which is run with model.trust_remote_code=true alone: read that code first"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json says"
    if "no file named" in text:
        return f"{text}; weights are read from safetensors alone, so save them as such"
    return text
