"""Small bases of other architectures with random weights, as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from lifealign.assets import TINY_MODEL

ARCHITECTURES: dict[str, type[PretrainedConfig]] = {"qwen2": Qwen2Config, "mistral": MistralConfig, "llama": LlamaConfig}


def random_base(folder: Path, architecture: str) -> Path:
    """Weights drawn from a fixed seed behind the bundled tokenizer; two layers, grouped keys, a head of its own."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    config = ARCHITECTURES[architecture](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # enough that an answer depends on its prompt
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
