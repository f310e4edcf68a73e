"""Bases in 4 bits: trained on, consolidated, cached apart, exported plain and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_base
from peft import PeftModel
from support import QUICK, end_here, train_here
from test_export import export
from transformers import AutoModelForCausalLM

from lifealign.command import hydra_command
from lifealign.models import quantization
from lifealign.models.base_hash import base_hash
from lifealign.models.lean import replace_small_operations
from lifealign.models.loading import attach_lora, load_base
from lifealign.models.options import BaseDtype, LoraOptions, ModelOptions, Quantization
from lifealign.models.policy import Policy
from lifealign.run import train
from lifealign.runtime.engine import ZeroOptions, deepspeed_config
from lifealign.validate.estimate import _base_bytes


def test_without_the_package_or_under_zero_3_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*QUICK, "model.quantization=nf4", f"run.dir={tmp_path / 'run'}")
    for found, zero, told in ((None, 0, "pip install 'lifealign[quantization]'"), (True, 3, "does not go with zero=3")):
        monkeypatch.setattr(quantization, "find_spec", lambda name, found=found: found)
        ended = end_here(lambda: hydra_command(train), *given, f"zero={zero}")
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert "model.quantization=nf4" in ended.err and told in ended.err


def options(base: Path, kind: Quantization) -> ModelOptions:
    return ModelOptions(path=str(base), dtype=BaseDtype.float32, quantization=kind)


def make_policy(base: Path, kind: Quantization) -> Policy:
    loaded = load_base(options(base, kind), deepspeed_config(ZeroOptions()))
    return Policy(attach_lora(loaded, LoraOptions(), seed=0))


def test_a_base_in_4_bits_is_another_base_and_stays_what_it_is(tmp_path: Path) -> None:
    """A base whose weights are doubled has the same 4-bit codes, and other scales: it is another one. A pass in eval mode
    leaves the weights as they are, on whatever CPU, and only the head and the embeddings are in float32."""
    pytest.importorskip("bitsandbytes")
    base = random_base(tmp_path / "base", "qwen2")
    policies = {kind: make_policy(base, kind).eval() for kind in Quantization}
    hashes = {kind: base_hash(policy) for kind, policy in policies.items()}
    assert len({*hashes.values()}) == 3
    nf4 = policies[Quantization.nf4]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        first, second = (nf4.base(input_ids=ids).logits for _ in range(2))
    parameters = [p for name, p in nf4.base.named_parameters() if "lora_" not in name]
    packed = sum(2 * p.numel() for p in parameters if p.dtype == torch.uint8)
    whole = sum(p.numel() for p in parameters if p.dtype == torch.float32)
    skeleton = load_base(options(base, Quantization.none), deepspeed_config(ZeroOptions()))
    assert _base_bytes(skeleton, options(base, Quantization.nf4)) == 4 * whole + packed * quantization.BITS / 8
    assert torch.equal(first, second) and base_hash(nf4) == hashes[Quantization.nf4]
    take_back = replace_small_operations(nf4.base)
    layer = nf4.base.get_decoder().layers[0]
    assert "forward" in vars(nf4.base.lm_head)  # a plain layer gets a forward of its own, and one in 4 bits keeps its package's
    assert not any("forward" in vars(part) for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj))
    take_back()
    doubled = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in doubled.model.layers:
        layer.mlp.up_proj.weight.data *= 2
    doubled.save_pretrained(tmp_path / "doubled")
    for path in base.glob("token*"):
        (tmp_path / "doubled" / path.name).write_bytes(path.read_bytes())
    assert base_hash(make_policy(tmp_path / "doubled", Quantization.nf4)) != hashes[Quantization.nf4]


@pytest.mark.parametrize(("kind", "architecture"), [("nf4", "qwen2"), pytest.param("fp4", "llama", marks=pytest.mark.slow)])
def test_training_and_export_on_a_base_in_4_bits(kind: str, architecture: str, tmp_path: Path) -> None:
    """Two tasks, both stages, consolidation in the second. The adapter is float32 and has been trained; the exported adapter
    computes what the run's policy does, and merged weights are in bfloat16 and not quantised."""
    pytest.importorskip("bitsandbytes")
    base = random_base(tmp_path / "base", architecture)
    settings = "model=custom", f"model.path={base}", "model.dtype=float32", f"model.quantization={kind}", "sft.lr=0.02"
    run = train_here(tmp_path / "run", *settings, "evaluation.metrics=[preference_accuracy]", f"cache.dir={tmp_path / 'cache'}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "step" and row["stage"] == "sft"]
    assert losses[-1] < losses[0]
    assert any(row["kind"] == "consolidation" for row in rows)

    ended = export(run, tmp_path / "plain")
    assert ended.code == 0, ended.err
    assert "differ from the run's by at most 0 nats" in ended.out
    code = (tmp_path / "plain" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    loaded: dict[str, Any] = {}
    exec(code.replace("'plain'", repr(str(tmp_path / "plain"))), loaded)  # as the card says
    assert loaded["base"].config.quantization_config.bnb_4bit_quant_type == kind
    ended = export(run, tmp_path / "merged", "--merge")
    assert ended.code == 0, ended.err
    assert "(tolerance 0.1)" in ended.out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16 and not hasattr(merged.config, "quantization_config")
    # By hand: the dequantised weight and the product of the factors, rounded once.
    quantised = quantization.read_base(str(base), options(base, Quantization(kind)))
    adapted = PeftModel.from_pretrained(quantised, str(tmp_path / "plain"))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    from bitsandbytes.functional import dequantize_4bit

    whole = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state) + layer.get_delta_weight(
        "default"
    )
    assert layer.get_delta_weight("default").abs().max() > 0 and layer.lora_A["default"].weight.dtype == torch.float32
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, whole.to(torch.bfloat16))
