"""Next-token training of a base over all tokens of packed rows, in one process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lifealign.assets.build_model import learning_rate
from lifealign.errors import TrainingDiverged
from lifealign.pretrain.options import PretrainOptions
from lifealign.runtime import distributed
from lifealign.runtime.terminal import step_progress

BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 0.1, 1.0
VALIDATION_SHARE = 0.01


def split(rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Training rows and 1 % (one at least) drawn at random for validation, each (rows, block)."""
    order = torch.randperm(len(rows), generator=generator)
    held_out = max(1, round(VALIDATION_SHARE * len(rows)))
    return rows[order[held_out:]], rows[order[:held_out]]


def train(
    model: nn.Module, rows: torch.Tensor, validation: torch.Tensor, options: PretrainOptions, generator: torch.Generator
) -> list[dict[str, float]]:
    """Train float32 weights in place, on this process's device, products in bfloat16 (autocast).

    Returns ``{"step", "train_loss", "validation_loss"}`` after every epoch, losses in nats a token, the first the mean over
    the epoch.

    Raises:
        TrainingDiverged: the loss is no longer a number.
    """
    model.to(distributed.device())
    steps_an_epoch = math.ceil(len(rows) / options.batch)
    steps = options.epochs * steps_an_epoch
    optimizer = torch.optim.AdamW(_groups(model), lr=options.lr, betas=BETAS, fused=True)
    history: list[dict[str, float]] = []
    with step_progress("pre-training", steps) as progress, _deterministic(distributed.device()):
        for epoch in range(options.epochs):
            losses: list[float] = []
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(options.batch):
                step = epoch * steps_an_epoch + len(losses)
                losses.append(_step(model, optimizer, batch.split(options.micro_batch), learning_rate(step, steps, options.lr)))
                if not math.isfinite(losses[-1]):
                    raise TrainingDiverged(f"step {step}: the loss is {losses[-1]}; lower --lr")
                progress.update(progress.task_ids[0], advance=1, figures=f"loss {losses[-1]:.3f}")
            mean, held_out = sum(losses) / len(losses), evaluate(model, validation, options.micro_batch)
            history.append({"step": (epoch + 1) * steps_an_epoch, "train_loss": mean, "validation_loss": held_out})
            progress.console.print(f"epoch {epoch + 1}: training {mean:.3f}, validation {held_out:.3f} nats a token")
    return history


def _groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices decay, gains and biases do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Sequence[torch.Tensor], rate: float) -> float:
    """One update on the mean loss over all rows of ``parts``, which is returned."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    optimizer.zero_grad()
    rows = sum(map(len, parts))
    total = 0.0
    for part in parts:
        loss = _loss(model, part) * (len(part) / rows)  # rows are of one length, so this adds up to the mean
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    return total


def _loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of ``rows``, (rows, block), each but the first of its row."""
    device = next(model.parameters()).device
    rows = rows.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, rows: torch.Tensor, micro_batch: int) -> float:
    """Nats a token over ``rows``, (rows, block)."""
    model.eval()
    return sum(_loss(model, part).item() * len(part) for part in rows.split(micro_batch)) / len(rows)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Inside, GPUs give the same bits every time; what the program had set comes back.

    CPUs do so anyhow, for a given number of threads, and torch would only be slower for filling memory.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
