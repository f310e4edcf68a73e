"""The network and the tokenizer of a base, in the form of the bundled model's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from lifealign.assets import build_model
from lifealign.pretrain.options import PretrainOptions

POSITIONS = 1024
"""What the configuration says of the longest row, unless rows of pre-training are longer."""


def new_tokenizer(texts: Iterable[str], options: PretrainOptions) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the ChatML template; fewer tokens than asked for where the texts have no more pairs to merge."""
    tokenizer = build_model.train_tokenizer(texts, options.vocab_size)
    tokenizer.model_max_length = max(POSITIONS, options.block)
    return tokenizer


def new_network(tokenizer: PreTrainedTokenizerFast, options: PretrainOptions) -> Qwen2ForCausalLM:
    """Untrained float32 weights, drawn from ``options.seed``."""
    torch.manual_seed(options.seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "max_position_embeddings": max(POSITIONS, options.block),
    }
    return build_model.new_model(tokenizer, sizes)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face folder; weights are kept in the dtype that they have."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
