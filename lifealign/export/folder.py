"""Write an adapter of a run into a folder that needs nothing of this package, and prove it before the folder stands."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from lifealign.config import Config, build, load_run, resolved
from lifealign.errors import UserError
from lifealign.export.card import Subject, model_card
from lifealign.export.reload import check_reload, merged_dtype, take_probe
from lifealign.memory.edit import finished_adapters, task_adapter
from lifealign.models.adapter import ADDED, copy_adapter
from lifealign.models.loading import load_tokenizer, resolve_path
from lifealign.models.options import Quantization
from lifealign.models.quantization import read_base
from lifealign.runtime import distributed
from lifealign.runtime.files import new_folder, write_text, writing
from lifealign.runtime.terminal import console


def export(run: Path, to: Path, *, merge: bool, task: str | None = None) -> None:
    """Write an adapter of a run, or with ``merge`` whole weights with the adapter in them, tokenizer and model card.

    The folder is written beside, loaded again by transformers and PEFT alone, compared with the run's policy, and only then
    put in its place; where anything fails nothing of it is left.

    Args:
        task: the finished task whose adapter is taken; None: the newest.

    Raises:
        UserError: where there is no such adapter, ``to`` exists or cannot be written, or what was written computes other
            log-probabilities than the run's policy.
    """
    composed = load_run(run)
    config = build(composed)
    adapter = task_adapter(run, task) if task is not None else finished_adapters(run)[-1]
    _check(run, to, adapter, config)
    probe = take_probe(adapter, config)
    with new_folder(to) as beside:
        _write(beside, to, adapter, config, merge=merge)
        reload = check_reload(beside, probe, config, merge=merge)
        subject = Subject(run, adapter.parent, to.name, merged=merge, of_task=task)
        card = model_card(subject, config, resolved(composed), reload)
        with writing(to):
            write_text(beside / "README.md", card)
    console.print(reload.line(), highlight=False, markup=False)
    console.print(f"written: {to}", highlight=False, markup=False)


def _check(run: Path, to: Path, adapter: Path, config: Config) -> None:
    if distributed.world_size() > 1:
        raise UserError("export runs in one process; start it with python")
    if (adapter / ADDED).exists():
        raise UserError(f"{run}: strategy={config.strategy.name} trained more than LoRA, which no PEFT adapter can hold")
    if not (adapter.parent / "scores.json").exists():
        raise UserError(f"{adapter.parent}: the run was interrupted before this task was scored; go on with it first")
    if to.exists():
        raise UserError(f"--to {to}: exists already; name a folder that does not")


def _write(folder: Path, to: Path, adapter: Path, config: Config, *, merge: bool) -> None:
    """Weights and tokenizer. Merged weights are in the base's dtype, or in bfloat16 where it is in 4 bits: one rounding of
    what the adapter adds."""
    if merge:
        base = read_base(resolve_path(config.model), config.model)
        if config.model.quantization is not Quantization.none:
            base = base.dequantize().float()
        whole = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        whole.to(merged_dtype(config.model))
        with writing(to):
            whole.save_pretrained(folder)
    else:
        with writing(to):
            copy_adapter(adapter, folder)
    tokenizer = load_tokenizer(config.model)
    with writing(to):
        tokenizer.save_pretrained(folder)
