"""Memory, disk and time of a run, from the shapes of a model without weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lifealign.config import Config
from lifealign.data.tasks import Task
from lifealign.memory import Space
from lifealign.models.adapter import factor_shapes
from lifealign.models.loading import attach_lora, make_skeleton, resolve_path
from lifealign.models.options import ModelOptions, Quantization
from lifealign.models.quantization import BITS
from lifealign.runtime import distributed
from lifealign.strategies.lifealign import LifeAlign
from lifealign.validate.work import TaskWork

MIB = 2**20
FLOAT32 = 4

FORWARD, BACKWARD = 2, 2
"""Operations a parameter and token: a product and a sum. Backward has the gradient of activations alone; weights are frozen."""

PRODUCT = 1024  # rows and columns of the matrices whose product is timed
TIMED_SECONDS = 0.5
ROW_TOKENS = 64  # at least, of a line in the layer that is timed; attention sees no further


@dataclass(frozen=True)
class Estimate:
    """Sizes are in bytes; activations are left out, since they depend on the attention implementation."""

    base: int  # a rank's share of the frozen base
    adapter: int  # weights, gradients and optimiser state of the adapter on a rank
    memory: int  # history of consolidated updates, over all ranks
    disk: int  # what the run directory will hold
    operations: float  # floating-point operations of the whole run in the weights of the layers; attention and head left out
    rate: float  # of them in a second, as one layer of the model reached it here in forward and backward
    seconds: float  # for these operations and nothing else, on all ranks at once, each as fast as this one: too few


def estimate(config: Config, tasks: Sequence[Task], work: Sequence[TaskWork], ranks: int) -> Estimate:
    """From shapes, and one short measurement of this machine."""
    with torch.device("meta"):  # shapes alone; weights that are tied stay one
        skeleton = make_skeleton(config.model)
        base = sum(p.numel() for p in skeleton.parameters())
        body = base - sum(p.numel() for p in {*_embeddings(skeleton)})
        base_bytes = _base_bytes(skeleton, config.model)
        model = attach_lora(skeleton, config.strategy.lora(config.model.lora, len(tasks)), seed=config.seed)
    factors, stage = sum(shape.numel() for shape in factor_shapes(model).values()), config.zero.stage
    memory, disk = _history(config, len(tasks), factors)
    optimizer, gradient = (2 / ranks if stage >= 1 else 2), (1 / ranks if stage >= 2 else 1)
    again = FORWARD if config.model.gradient_checkpointing else 0
    tokens = sum((FORWARD + BACKWARD + again) * task.trained_tokens + FORWARD * task.read_tokens for task in work)
    operations, rate = float(body) * tokens, layer_rate(config, _micro_batch_tokens(config, tasks))
    return Estimate(
        base=int(base_bytes / (ranks if stage == 3 else 1)),
        adapter=int(factors * FLOAT32 * (1 + gradient + optimizer)),
        memory=memory,
        disk=2 * disk + (len(work) + 1 + config.checkpoint.keep) * factors * FLOAT32,  # checkpoints hold a copy of the ledger's
        operations=operations,
        rate=rate,
        seconds=operations / rate / ranks,
    )


def _micro_batch_tokens(config: Config, tasks: Sequence[Task]) -> int:
    """Of a micro-batch of the preference stage, on average."""
    pairs = [pair for task in tasks for pair in task.train]
    mean = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs) / len(pairs)
    return max(1, round(config.preference.micro_batch_size * mean))


def layer_rate(config: Config, tokens: int) -> float:
    """Operations a second that one layer, of random weights and with its adapter, does in forward and backward of so many
    tokens: its own small products, norms and attention, where a large matrix product would promise too much.

    Of a large layer it takes fewer tokens, so that a pass is not much longer than ``TIMED_SECONDS``.
    """
    trust = config.model.trust_remote_code
    shapes = AutoConfig.from_pretrained(resolve_path(config.model), trust_remote_code=trust)
    shapes.num_hidden_layers, shapes.vocab_size = 1, 64
    if getattr(shapes, "layer_types", None):
        shapes.layer_types = shapes.layer_types[:1]
    shapes.pad_token_id = shapes.bos_token_id = shapes.eos_token_id = None
    dtype, device = getattr(torch, config.model.dtype.value), distributed.device()
    base = AutoModelForCausalLM.from_config(shapes, dtype=dtype, trust_remote_code=trust).requires_grad_(False)
    parameters = sum(p.numel() for p in base.parameters()) - sum(p.numel() for p in {*_embeddings(base)})
    decoder = attach_lora(base, config.model.lora, seed=config.seed).to(device).get_base_model().get_decoder()
    operations = (FORWARD + BACKWARD) * parameters
    tokens = min(tokens, max(1, int(product_rate(dtype) * TIMED_SECONDS / operations)))
    rows = max(1, tokens // ROW_TOKENS)
    embedded = torch.randn(rows, tokens // rows, shapes.hidden_size, dtype=dtype, device=device, requires_grad=True)

    def work() -> None:
        decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state.sum().backward()
        embedded.grad[0, 0, 0].item()  # waits for a card

    return operations * rows * (tokens // rows) * passes_a_second(work)


def passes_a_second(work: Callable[[], object]) -> float:
    work()  # the first pays for what is set up once
    passes, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < TIMED_SECONDS:
        work()
        passes += 1
    return passes / spent


def _embeddings(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Those of the input, which are looked up, and of the output, which meets few tokens; the same where they are tied."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        yield from module.parameters()


def _base_bytes(model: PreTrainedModel, options: ModelOptions) -> float:
    """Of its parameters, in the dtype or the 4 bits that a configuration asks for."""
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)} - {*_embeddings(model)}
    packed = sum(weight.numel() for weight in linear) if options.quantization is not Quantization.none else 0
    whole = sum(p.numel() for p in model.parameters()) - packed
    return whole * getattr(torch, options.dtype.value).itemsize + packed * BITS / 8


def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product on this rank's device."""
    device = distributed.device()
    left, right = (torch.ones(PRODUCT, PRODUCT, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * PRODUCT**3 * passes_a_second(lambda: (left @ right)[0, 0].item())  # item() waits for a card


def _history(config: Config, tasks: int, factors: int) -> tuple[int, int]:
    """Bytes of the directions that consolidation keeps at hand, and of the ledger's updates on disk."""
    strategy = config.strategy
    if not isinstance(strategy, LifeAlign):
        return 0, 0
    trained = [stage for stage in ("sft", "preference") if getattr(config, stage).epochs]
    directions = tasks * len({*trained} & {*strategy.consolidate_stages})
    if strategy.memory_rank is not None:
        directions = min(directions, strategy.memory_rank)
    parts = 2 if strategy.space is Space.product else 1  # the difference of two products has twice their rank
    width = getattr(torch, strategy.memory_dtype.value).itemsize
    return directions * parts * factors * width, tasks * len(trained) * parts * factors * width


def estimate_table(found: Estimate, ranks: int) -> Table:
    table = Table(title="Estimate, without activations")
    table.add_column("what")
    table.add_column("estimate", justify="right")
    for what, size in (
        ("base, a rank", found.base),
        ("adapter with gradients and optimiser, a rank", found.adapter),
        ("long-term memory, all ranks", found.memory),
        ("disk", found.disk),
    ):
        table.add_row(what, f"{size / MIB:,.1f} MiB")
    table.add_row("arithmetic of all layers, all ranks", f"{found.operations / 1e12:,.3g} TFLOP")
    table.add_row("one layer of it, measured here", f"{found.rate / 1e9:,.3g} GFLOP/s")
    where = "" if ranks == 1 else f", on {ranks} such devices"
    table.add_row(f"time of that arithmetic alone{where}", _duration(found.seconds))
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
