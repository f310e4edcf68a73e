"""The adapter as named factors: read and written whole, whatever ZeRO stage the model is under."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lifealign.errors import UserError, library_line
from lifealign.models.policy import Policy, gathered
from lifealign.runtime import distributed
from lifealign.runtime.files import replace_folder

ADAPTER = "default"  # PEFT's name for an adapter that is given none
WEIGHTS = "adapter_model.safetensors"  # the file of PEFT's layout with the factors
CONFIG = "adapter_config.json"  # beside it: what they are
ADDED = "added.safetensors"  # beside it: what a strategy trains that is not LoRA


def named_factors(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every LoRA factor, in an order that all ranks share."""
    return ((name, p) for name, p in model.named_parameters() if "lora_" in name)


def factor_shapes(model: PeftModel) -> dict[str, torch.Size]:
    """Whole shape of every factor; under ZeRO-3 the local tensor of a partitioned one is empty."""
    return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in named_factors(model)}


def read_factors(model: PeftModel, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """Copies of whole factors on the CPU, float32. Call on every rank; each keeps those in ``names`` (None: all).

    Factors are gathered one at a time, so that never more than one partitioned factor stands whole beside the copies.
    """
    copies = {}
    for name, parameter in named_factors(model):
        with gathered([parameter]):
            if names is None or name in names:
                copies[name] = parameter.detach().float().cpu().clone()
    return copies


def write_factors(model: PeftModel, values: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
    """Set the factors in ``owners`` on every rank to the value that the owning rank holds.

    Args:
        values: new values of the factors that this rank owns.
        owners: rank of every factor to be set.
    """
    by_owner: dict[int, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in named_factors(model):
        if name in owners:
            by_owner[owners[name]].append((name, parameter))
    for owner, factors in sorted(by_owner.items()):
        partitioned = any(hasattr(p, "ds_id") for _, p in factors)
        # Under ZeRO-3 a factor at a time, so that never more than one stands whole; else all of an owner's together.
        for share in [[factor] for factor in factors] if partitioned else [factors]:
            parameters = [p for _, p in share]
            with gathered(parameters, modifier_rank=owner), torch.no_grad():
                if owner == distributed.rank():
                    for name, parameter in share:
                        parameter.copy_(values[name])
                if not partitioned:  # what was gathered is sent out by the rank that changed it
                    distributed.broadcast_all([p.data for p in parameters], owner)


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Inside, adapted layers hold W + scaling * B A where that is as good as the adapter beside W, and compute no more.

    For evaluation: dropout and gradients of the adapter are left out. Holds a second copy of every adapted weight. The
    tensors that stood there before come back as they were: subtracting what was added would leave its rounding behind.
    """
    before: list[tuple[lora.Linear, torch.Tensor]] = []
    try:
        for layer in model.modules():
            if isinstance(layer, lora.Linear) and _can_merge(layer):
                weight, name = layer.base_layer.weight, layer.active_adapters[0]
                a, b = layer.lora_A[name].weight.detach().float(), layer.lora_B[name].weight.detach().float()
                before.append((layer, weight.data))
                weight.data = torch.addmm(weight.data, b, a, alpha=layer.scaling[name])
                layer.merged_adapters.append(name)  # what PEFT's forward goes by
        yield
    finally:
        for layer, own in reversed(before):  # a weight that two layers share has been replaced twice
            layer.base_layer.weight.data = own
            layer.merged_adapters.clear()


def _can_merge(layer: lora.Linear) -> bool:
    """Whether merging changes nothing but rounding in float32; what is not plain LoRA is left to PEFT."""
    base, names = layer.base_layer, layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return False
    if type(base) is not torch.nn.Linear or names[0] in layer.lora_variant or layer.lora_bias[names[0]]:
        return False
    if any(hasattr(p, "ds_id") for p in layer.parameters()):
        return False  # partitioned by ZeRO-3: no rank holds the weight
    # A weight of 16 bits would round off an update that is small beside it, and so generate from another adapter.
    return base.weight.dtype == torch.float32


def saved_name(name: str) -> str:
    """What a factor is called in PEFT's files, which leave out the name of the adapter."""
    return name.replace(f".{ADAPTER}.", ".")


def load_adapter(policy: Policy, folder: Path) -> None:
    """Set the adapter to one that :func:`save_adapter` wrote. Call on every rank.

    Raises:
        UserError: where it is not one of this policy's.
    """
    saved = read_tensors(folder / WEIGHTS)
    values = {name: saved.get(saved_name(name)) for name, _ in named_factors(policy.model)}
    shapes = {name: value.shape for name, value in values.items() if value is not None}
    if shapes != factor_shapes(policy.model):
        raise UserError(f"{folder / WEIGHTS}: holds another adapter than the run's; take it from a copy of the run")
    write_factors(policy.model, values, dict.fromkeys(values, 0))
    if policy.added:
        write_added(policy, read_tensors(folder / ADDED))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises UserError where it is none, whatever else it is: nothing else is opened."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({library_line(error)}); take it from a copy") from error


def copy_adapter(folder: Path, to: Path) -> None:
    """What :func:`save_adapter` wrote, and nothing that has come to lie beside it."""
    to.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG, ADDED):
        if name != ADDED or (folder / ADDED).exists():
            shutil.copyfile(folder / name, to / name)


def read_added(policy: Policy) -> dict[str, torch.Tensor]:
    """Copies on the CPU of what a strategy trains beside LoRA, by name."""
    return {name: parameter.detach().cpu().clone() for name, parameter in policy.added.items()}


def write_added(policy: Policy, values: Mapping[str, torch.Tensor]) -> None:
    """Set what a strategy trains beside LoRA; every rank holds the same values."""
    with torch.no_grad():
        for name, parameter in policy.added.items():
            parameter.copy_(values[name])


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the adapter in PEFT's own layout, so that ``PeftModel.from_pretrained(base, folder)`` opens it.

    What a strategy trains beside LoRA stands beside it in a file of its own, which PEFT does not read. Call on every rank;
    rank 0 writes. The folder is replaced as a whole: what is there is the old adapter or the new one, and for a moment nothing.
    """
    model = policy.model
    whole = read_factors(model)
    if not distributed.is_main():
        return
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    beside.mkdir(parents=True)
    state = get_peft_model_state_dict(model, state_dict=dict(whole), save_embedding_layers=False)
    save_file({k: v.contiguous() for k, v in state.items()}, beside / WEIGHTS, {"format": "pt"})
    if policy.added:
        save_file(read_added(policy), beside / ADDED)
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order would differ from run to run
    config.save_pretrained(str(beside))
    replace_folder(beside, folder)
