"""O-LoRA: blocks of past tasks stay to the bit, the penalty is the paper's, and new subspaces come out orthogonal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import compose_config, train_here
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lifealign.config import build
from lifealign.data.batch import Row, RowLayout, collate
from lifealign.errors import UserError
from lifealign.models.adapter import named_factors, save_adapter
from lifealign.models.loading import attach_lora
from lifealign.models.options import LoraOptions
from lifealign.models.policy import Policy
from lifealign.strategies.base import Context
from lifealign.strategies.olora import OLoRA, Overlap

NARROW = LoraOptions(r=4, alpha=8)
ROWS = [Row([5, 9, 11, 3], [[7, 3], [8, 8, 4]]), Row([21, 6], [[40, 41, 42, 43], [2]])]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of this size gain nothing from a second thread, and wait for it where a machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_base() -> PreTrainedModel:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=24,
        initializer_range=0.2,
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    base.requires_grad_(False)
    return base


def prepared(tasks: int, **options: Any) -> tuple[Policy, OLoRA]:
    strategy = OLoRA(**options)
    policy = Policy(attach_lora(small_base(), strategy.lora(NARROW, tasks), seed=3))
    strategy.setup_model(policy, seed=3)
    strategy.setup(context(policy, 0).run)
    return policy, strategy


def context(policy: Policy, task: int) -> Context:
    run: Any = SimpleNamespace(policy=policy)
    where: Any = None
    return Context(run, where, task, "sft")


def logps(policy: Policy) -> torch.Tensor:
    return policy(collate(ROWS, layout=RowLayout.concatenated, pad_token_id=0))


def blocks(policy: Policy, task: int) -> dict[str, torch.Tensor]:
    """Copies of a task's rows of each A and columns of each B."""
    mine = slice(4 * task, 4 * task + 4)
    return {n: (p[mine] if "lora_A" in n else p[:, mine]).detach().clone() for n, p in named_factors(policy.model)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# The adapter


def test_the_first_block_is_the_adapter_of_a_plain_run() -> None:
    """A's first rows are what the same seed draws for rank 4, and they count as much: 8 / 4 = 24 / 12."""
    policy, _ = prepared(tasks=3)
    plain = Policy(attach_lora(small_base(), NARROW, seed=3))
    assert same(blocks(policy, 0), blocks(plain, 0))
    assert not any(same(blocks(policy, 0), blocks(policy, task)) for task in (1, 2))
    assert {type(p) for _, p in named_factors(policy.model)} == {torch.nn.Parameter}
    assert list(policy.model.peft_config) == ["default"]
    with torch.no_grad():
        for (name, wide), (_, narrow) in zip(named_factors(policy.model), named_factors(plain.model), strict=True):
            if "lora_B" in name:
                wide[:, :4] = narrow.normal_(std=0.3)
    torch.testing.assert_close(logps(policy), logps(plain), rtol=1e-5, atol=1e-5)
    with policy.without_adapter():
        assert not torch.allclose(logps(policy), logps(plain), atol=0.1)


def test_what_is_saved_is_an_ordinary_adapter_and_merges(tmp_path: Path) -> None:
    policy, _ = prepared(tasks=3)
    for _, factor in named_factors(policy.model):
        torch.nn.init.normal_(factor, std=0.2)
    expected = logps(policy).detach()
    save_adapter(policy, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(small_base(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logps(Policy(opened)).detach(), expected, rtol=1e-5, atol=1e-5)
    again = Policy(attach_lora(opened.merge_and_unload(), NARROW, seed=0))  # B is 0: the base alone
    torch.testing.assert_close(logps(again).detach(), expected, rtol=1e-4, atol=1e-4)


# The penalty


@pytest.mark.parametrize("overlap_of", Overlap)
def test_the_penalty_and_its_gradient_are_the_papers(overlap_of: Overlap) -> None:
    """Third task, float64: every product of a row of A_3 with a row of A_1 or A_2, absolute or squared, and all entries of
    block 3.

    The gradient for A_3 is w f'(A_3 A_past^T) A_past + 2 v A_3, f' the sign or twice the number; past and coming blocks have
    none.
    """
    squared = overlap_of is Overlap.squared
    policy, strategy = prepared(tasks=4, orthogonality=0.7, overlap=overlap_of, l2=0.03)
    policy.double()
    for _, factor in named_factors(policy.model):
        torch.nn.init.normal_(factor)
    strategy.begin_stage(context(policy, 2))
    terms = strategy.loss_terms(context(policy, 2))
    overlap = size = 0.0
    for name, factor in named_factors(policy.model):
        own = factor[8:12] if "lora_A" in name else factor[:, 8:12]
        size += sum(float(x) ** 2 for x in own.detach().flatten())
        if "lora_A" in name:
            products = [float(factor.detach()[i] @ row.detach()) for i in range(8) for row in own]
            overlap += sum(product**2 if squared else abs(product) for product in products)
    assert terms["orthogonality"].item() == pytest.approx(0.7 * overlap)
    assert terms["l2"].item() == pytest.approx(0.03 * size)

    sum(terms.values()).backward()  # type: ignore[union-attr]
    for name, factor in named_factors(policy.model):
        assert factor.grad is not None
        expected = torch.zeros_like(factor)
        if "lora_A" in name:
            past, own = factor.detach()[:8], factor.detach()[8:12]
            slope = 2 * own @ past.T if squared else (own @ past.T).sign()
            expected[8:12] = 0.7 * slope @ past + 2 * 0.03 * own
        else:
            expected[:, 8:12] = 2 * 0.03 * factor.detach()[:, 8:12]
        torch.testing.assert_close(factor.grad, expected)


def test_gradients_of_the_loss_stay_in_the_own_block() -> None:
    """All blocks work in the forward pass, and would all be trained."""
    policy, strategy = prepared(tasks=3)
    for _, factor in named_factors(policy.model):
        torch.nn.init.normal_(factor, std=0.2)
    strategy.begin_stage(context(policy, 1))
    logps(policy).sum().backward()
    for name, factor in named_factors(policy.model):
        assert factor.grad is not None
        gradient = factor.grad if "lora_A" in name else factor.grad.T
        assert [bool(gradient[start : start + 4].any()) for start in (0, 4, 8)] == [False, True, False]


def test_the_first_task_has_no_past() -> None:
    policy, strategy = prepared(tasks=2)
    strategy.begin_stage(context(policy, 0))
    assert {name: float(value) for name, value in strategy.loss_terms(context(policy, 0)).items()} == {
        "orthogonality": 0.0,
        "l2": 0.0,
    }


# Training


def train_task(policy: Policy, strategy: OLoRA, task: int, *, steps: int, weight_decay: float) -> None:
    """Towards long responses of the rows, by AdamW and a cosine to 0."""
    strategy.begin_stage(where := context(policy, task))
    factors = [p for _, p in named_factors(policy.model)]
    optimizer = torch.optim.AdamW(factors, lr=0.01, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0]) * (-1) ** task  # the second task prefers what the first one did not
    for _ in range(steps):
        margin = (sign * logps(policy)).view(-1, 2).sum(1)
        loss = -torch.nn.functional.logsigmoid(-margin).mean() + torch.stack([*strategy.loss_terms(where).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    strategy.end_stage(where)


def largest_cosine(policy: Policy) -> float:
    """Between rows of the first and of the second block of any A."""
    first, second = blocks(policy, 0), blocks(policy, 1)
    return max(
        float((normalize(first[n].double(), dim=1) @ normalize(second[n].double(), dim=1).T).abs().max())
        for n in first
        if "lora_A" in n
    )


@pytest.mark.parametrize(
    ("orthogonality", "overlap", "low", "high"),
    [(0.0, Overlap.absolute, 0.1, 1.0), (0.5, Overlap.absolute, 0.0, 1e-3), (20.0, Overlap.squared, 0.0, 1e-3)],
)
def test_past_and_new_subspaces_are_orthogonal_after_training(
    orthogonality: float, overlap: Overlap, low: float, high: float
) -> None:
    """The paper's property, with its weight; without the penalty the same training leaves them as they fall."""
    policy, strategy = prepared(tasks=2, orthogonality=orthogonality, overlap=overlap)
    for task in (0, 1):
        before = logps(policy).detach()
        train_task(policy, strategy, task, steps=150, weight_decay=0.0)
        assert (logps(policy).detach() - before).abs().max() > 0.5, "the task must have been learned beside the penalty"
    assert low <= largest_cosine(policy) < high


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_task_changes_its_own_block_alone(weight_decay: float) -> None:
    policy, strategy = prepared(tasks=3, l2=0.1)
    for task in range(3):
        before = [blocks(policy, block) for block in range(3)]
        train_task(policy, strategy, task, steps=5, weight_decay=weight_decay)
        assert [same(before[block], blocks(policy, block)) for block in range(3)] == [block != task for block in range(3)]


def test_past_blocks_stay_to_the_bit_through_a_run(tmp_path: Path) -> None:
    """Both stages of both tasks, under ZeRO-2; the second block stands at B = 0 until the second task."""
    run = train_here(
        tmp_path / "run",
        "strategy=olora",
        "zero=2",
        "data.max_train=8",
        "data.max_eval=4",
        "sft.epochs=1",
        "preference.epochs=1",
        "evaluation.metrics=[mean_log_sigmoid]",
    )
    left = [load_file(task / "adapter" / "adapter_model.safetensors") for task in sorted((run / "tasks").iterdir())]
    assert len(left) == 2
    for name, first in left[0].items():
        second = left[1][name]
        dim = 0 if "lora_A" in name else 1
        assert first.shape[dim] == 16
        assert torch.equal(first.narrow(dim, 0, 8), second.narrow(dim, 0, 8))
        assert not torch.equal(first.narrow(dim, 8, 8), second.narrow(dim, 8, 8))
        if dim == 1:
            assert first.narrow(dim, 0, 8).any()
            assert not first.narrow(dim, 8, 8).any()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    penalties = [(row["task_number"], row["orthogonality"]) for row in rows if row["kind"] == "step"]
    assert all((penalty > 0) == (task == 1) for task, penalty in penalties)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["zero=3"], r"strategy=olora does not run with zero=3"),
        (["strategy.orthogonality=-1"], r"strategy\.orthogonality=-1\.0: must be 0 or more"),
    ],
)
def test_what_cannot_run_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        build(compose_config("+sequence=six_domains", "strategy=olora", *overrides))
