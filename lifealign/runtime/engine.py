"""The DeepSpeed engine: one for each training stage, and one to run a partitioned model without training it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import safe_get_full_grad, safe_set_full_grad
from torch import nn

from lifealign.errors import UserError
from lifealign.runtime import distributed

if not torch.cuda.is_available():
    # DeepSpeed would compile a shared-memory all-reduce for CPU ranks on first use: a minute, and a compiler that the
    # machine may not have, for messages that gloo carries as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass
class ZeroOptions:
    """``zero.*``: how optimiser state, gradients and weights are partitioned over ranks."""

    stage: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # further keys of DeepSpeed's zero_optimization section

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"zero.stage={self.stage}: must be 0, 1, 2 or 3")
        if "stage" in self.settings:
            raise UserError("zero.settings.stage: set zero.stage instead")

    @property
    def offloads_optimizer(self) -> bool:
        """Whether DeepSpeed is to keep the optimiser's state in the host's memory, or on disk."""
        section = self.settings.get("offload_optimizer")
        offloads = isinstance(section, Mapping) and section.get("device", "none") != "none"
        return self.stage > 0 and (offloads or bool(self.settings.get("cpu_offload")))  # the latter is an older name for it


def deepspeed_config(
    zero: ZeroOptions, *, micro_batch_size: int = 1, accumulation: int = 1, max_grad_norm: float = 0.0
) -> dict[str, Any]:
    """DeepSpeed's configuration. No bf16 section: the base has its own dtype and the adapter is float32.

    Its throughput timer would wait for the device twice in every micro-batch, for a figure that nobody reads. Gradients are
    exchanged in pieces: DeepSpeed reserves the memory of one, however small an adapter is (0.2 GB; by default ten times that).
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": zero.stage, "reduce_bucket_size": 50_000_000, **zero.settings},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload_optimizer: torch's AdamW takes its step on the CPU, too
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }


@contextmanager
def training_engine(
    module: nn.Module,
    config: dict[str, Any],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    make_schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
) -> Iterator[deepspeed.DeepSpeedEngine]:
    """A fresh engine, optimiser and schedule around the trainable parameters; torn down on leaving."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=trainable,
        optimizer=make_optimizer(trainable),
        lr_scheduler=make_schedule,
        config=config,
        dist_init_required=False,
    )
    try:
        yield engine
    finally:
        _close(engine)


@contextmanager
def inference_engine(module: nn.Module, zero: ZeroOptions) -> Iterator[nn.Module]:
    """Something to call the module through when it is not being trained.

    A whole module is called as it is. One that ZeRO-3 has partitioned needs DeepSpeed's hooks to gather its weights.
    """
    if zero.stage < 3:
        module.to(distributed.device())
        yield module
        return
    engine, *_ = deepspeed.initialize(model=module, config=deepspeed_config(zero), dist_init_required=False)
    try:
        yield engine
    finally:
        _close(engine)


def _close(engine: deepspeed.DeepSpeedEngine) -> None:
    """Tear an engine down. ZeRO-3 keeps weights whole that it expects to need again soon; nobody will ask it for them.

    DeepSpeed leaves hooks on the module, which would run in every later forward pass and keep the engine, and with it the
    optimiser's state, for as long as there is a policy.
    """
    if engine.zero_optimization_partition_weights():
        engine.empty_partition_cache()
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    # Whenever the engine itself is collected it destroys its optimiser again, and would then reach into the next one's weights.
    engine.optimizer = engine.basic_optimizer = engine.client_optimizer = engine.lr_scheduler = None


def step(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor | None:
    """Let the engine take its step, or only count a micro-batch; returns the norm of the whole gradient before clipping.

    The norm is a scalar on the device, so that nobody waits for it here; None where the engine has only counted. ZeRO 1
    to 3 compute it while they step; at stage 0 every rank holds the whole averaged gradient until the step clears it.
    """
    stepping = engine.is_gradient_accumulation_boundary()
    norm = None
    if stepping and engine.zero_optimization_stage() == 0:
        trained = (p for group in engine.optimizer.param_groups for p in group["params"])
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    engine.step()
    if not stepping:
        return None
    norm = engine.get_global_grad_norm() if norm is None else norm
    if isinstance(norm, torch.Tensor):
        return norm.to(distributed.device())
    return torch.full((), norm, dtype=torch.float64, device=distributed.device())  # filled there: nothing is copied


def skip(engine: deepspeed.DeepSpeedEngine) -> None:
    """End a step whose gradients are not to be used: schedule and counts go on, weights and moments stay as they are."""
    usual = engine.optimizer.step
    engine.optimizer.step = lambda *_, **__: _drop_gradients(engine)
    try:
        engine.step()
    finally:
        engine.optimizer.step = usual


def _drop_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """What DeepSpeed's own optimisers do, beside stepping, before the next backward pass; stage 0 needs nothing."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return
    if stage == 3:
        zero._pre_step()
        zero._partition_all_parameters()
    else:
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
    zero.overflow = False
    zero.zero_grad(set_to_none=True)
    zero.averaged_gradients = {}
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        zero.reset_cpu_buffers()


def read_gradients(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Whole gradients by parameter name, averaged over ranks and micro-batches; between a step's backward pass and its step.

    Call on every rank; for ZeRO stages 0 to 2.
    """
    whole = engine.zero_optimization_stage() == 0
    named = ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)
    gradients = {name: p.grad if whole else safe_get_full_grad(p) for name, p in named}
    return {name: gradient.detach().float().clone() for name, gradient in gradients.items() if gradient is not None}


def write_gradients(engine: deepspeed.DeepSpeedEngine, gradients: Mapping[str, torch.Tensor]) -> None:
    """Put whole gradients, the same on every rank, in the place of those that :func:`read_gradients` read."""
    parameters = dict(engine.module.named_parameters())
    for name, gradient in gradients.items():
        if engine.zero_optimization_stage() == 0:
            parameters[name].grad.copy_(gradient)
        else:
            safe_set_full_grad(parameters[name], gradient)
