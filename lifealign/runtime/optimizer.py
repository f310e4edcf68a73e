"""AdamW's state as whole tensors by parameter name: what a checkpoint holds, whatever the ZeRO stage and number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state
from torch import nn
from torch.nn.functional import pad

from lifealign.runtime import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


def read_optimizer(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """``NAME/exp_avg`` and ``NAME/exp_avg_sq`` in the shape of the parameter, ``NAME/step`` a scalar; float32, on the CPU.

    A parameter that has never had a gradient has no state, and none has any before the first step is taken. Call on every
    rank.
    """
    found = {}
    for name, parameter in _trained(engine):
        for key, value in _state_of(engine, parameter).items():
            found[f"{name}/{key}"] = value.detach().float().cpu().clone()
    return found


def write_optimizer(engine: deepspeed.DeepSpeedEngine, state: Mapping[str, torch.Tensor]) -> None:
    """Give a fresh engine the state that :func:`read_optimizer` read, on any number of ranks.

    Args:
        state: the same on every rank.
    """
    stage = engine.zero_optimization_stage()
    if not state:
        return
    if stage > 0:
        _make_room(engine, steps=max(float(value) for key, value in state.items() if key.endswith(f"/{STEP}")))
    for name, parameter in _trained(engine):
        own = {key: state[f"{name}/{key}"].to(distributed.device()) for key in (*MOMENTS, STEP) if f"{name}/{key}" in state}
        if stage == 0 and own:
            engine.optimizer.state[parameter] = own
        for key in MOMENTS if stage > 0 else ():
            value = own.get(key, torch.zeros(getattr(parameter, "ds_shape", parameter.shape), device=distributed.device()))
            if stage == 3:
                safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


def _trained(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _state_of(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> Mapping[str, torch.Tensor]:
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state.get(parameter, {})
    flat = engine.optimizer.optimizer.state
    if not flat:
        return {}
    counted = next(iter(flat.values()))[STEP]  # ZeRO steps flat stretches of all parameters together, so it is that of all
    return {**{key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}, STEP: counted}


def _make_room(engine: deepspeed.DeepSpeedEngine, *, steps: float) -> None:
    """ZeRO makes the state of its flat stretches in the first step, and has no way of its own to make it before."""
    zero = engine.optimizer
    is_third = engine.zero_optimization_stage() == 3
    for flat in zero.fp32_partitioned_groups_flat if is_third else zero.single_partition_of_fp32_groups:
        moments = {key: torch.zeros_like(flat) for key in MOMENTS}
        zero.optimizer.state[flat] = {**moments, STEP: torch.full((), steps, dtype=torch.float32, device=flat.device)}
    if not is_third:
        zero._lazy_init_hp_params_optimizer_state()  # so that each parameter finds its own stretch


def _own_part(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a value that ZeRO-3 partitions; the last parts are padded."""
    size = parameter.ds_tensor.numel()
    flat = whole.flatten()
    return pad(flat, (0, size * distributed.world_size() - len(flat))).narrow(0, size * distributed.rank(), size)
