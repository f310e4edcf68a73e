"""Take the adapter out of a run: as PEFT's own layout, or merged into the base."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lifealign.config import build, load_run
from lifealign.errors import UserError
from lifealign.models.adapter import ADDED
from lifealign.models.loading import load_tokenizer, resolve_path
from lifealign.runtime.files import replace_folder


def export(run: Path, to: Path, *, merge: bool) -> None:
    """Write the run's adapter, or with ``merge`` whole weights with the adapter in them, and the tokenizer.

    Raises:
        UserError: where the run has no adapter yet, or ``to`` exists.
    """
    config = build(load_run(run))
    adapter = run / "adapter"
    if not adapter.exists():
        raise UserError(f"{run}: no task of this run is finished, so there is no adapter to export")
    if (adapter / ADDED).exists():
        raise UserError(f"{run}: strategy={config.strategy.name} trained more than LoRA, which no PEFT adapter can hold")
    if to.exists():
        raise UserError(f"--to {to}: exists already; name a folder that does not")
    beside = to.with_name(to.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    if merge:
        dtype = getattr(torch, config.model.dtype.value)
        base = AutoModelForCausalLM.from_pretrained(resolve_path(config.model), dtype=dtype)
        PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(beside)
    else:
        shutil.copytree(adapter, beside)
    load_tokenizer(config.model).save_pretrained(beside)
    replace_folder(beside, to)
