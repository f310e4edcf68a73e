"""TRL's DPOTrainer in a process of its own, a step at a time; started by step.py, to which it answers in lines of JSON.

It imports nothing of LifeAlign, whose settings of the process (thread waiting, huge pages) TRL's users do not have.
The first line in is the order: base, dtype, pairs, factors (a safetensors file), online, autocast, checkpointing, and the
numbers of the training. Every further line is a batch, a list of indices; the answer holds the loss and the processor
seconds it took.
"""

import os

os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import contextlib
import json
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class Pretokenised(DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


def make_trainer(order: dict[str, Any], folder: str) -> DPOTrainer:
    """The trainer and its data, from the adapter in ``order["factors"]``."""
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=order["batch_size"],
        precompute_ref_log_probs=not order["online"],
        learning_rate=order["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=order["max_grad_norm"],
        beta=order["beta"],
        gradient_checkpointing=order["checkpointing"],
        bf16=order["autocast"],
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=order["seed"],
    )
    trainer = Pretokenised(
        model=AutoModelForCausalLM.from_pretrained(order["base"], dtype=getattr(torch, order["dtype"])),
        args=arguments,
        train_dataset=Dataset.from_list(order["pairs"]),
        processing_class=AutoTokenizer.from_pretrained(order["base"]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    assert trainer.accelerator.distributed_type is DistributedType.NO, "TRL must not wrap its model"
    own = {name: p for name, p in trainer.model.named_parameters() if "lora_" in name}
    factors = load_file(order["factors"])
    assert own.keys() == factors.keys()
    for name, value in factors.items():
        assert own[name].dtype == torch.float32
        own[name].data.copy_(value)
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: DPOTrainer, model: torch.nn.Module, batch: list[dict[str, Any]]) -> float:
    """One optimiser step, in the order of ``transformers.Trainer``."""
    inputs = trainer.data_collator(batch)
    loss = trainer.training_step(model, inputs)
    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    model.zero_grad()
    return loss.item()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    warnings.simplefilter("ignore")
    disable_progress_bars()
    order = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(answers):
        trainer = make_trainer(order, folder)
        model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        model.train()
        rows = trainer.train_dataset.to_list()
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            started = time.process_time()
            loss = step(trainer, model, [rows[i] for i in json.loads(line)])
            print(json.dumps([loss, time.process_time() - started]), file=answers, flush=True)


if __name__ == "__main__":
    main()
