"""L2P: rows read the prompts that suit them under every layout and in generation, and nothing but the pool is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import compose_config, train_here
from test_export import export
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM

from lifealign.config import build
from lifealign.data.batch import Batch, Row, RowLayout, collate
from lifealign.data.tokenize import Pair
from lifealign.errors import UserError
from lifealign.evaluation.generation import generate
from lifealign.models.adapter import named_factors, saved_name
from lifealign.models.loading import attach_lora, load_base, load_tokenizer
from lifealign.models.options import LoraOptions, ModelOptions
from lifealign.models.policy import Policy, choose_layout, choose_operations
from lifealign.rescore import rescore
from lifealign.strategies.base import Context, Seen
from lifealign.strategies.l2p import L2P

CPU = torch.device("cpu")
BUNDLED = ModelOptions(path="bundled")
ROWS = [
    Row([40, 900, 77, 1200, 13], [[7, 301, 2], [8, 8, 400, 2]]),
    Row([2100, 2101], [[40, 41, 42, 43], [9]]),
    Row([500, 501, 502, 40, 503, 504, 505], [[60, 2], [61, 62, 2]]),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of this size gain nothing from a second thread, and wait for it where a machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bundled(**options: Any) -> tuple[Policy, L2P]:
    """The demonstration model with a pool whose prompts and keys are no longer what they were drawn as."""
    policy = Policy(attach_lora(load_base(BUNDLED, {"zero_optimization": {"stage": 0}}), LoraOptions(r=2), seed=0))
    choose_layout(policy, RowLayout.packed, longest_row=64, device=CPU)
    return policy, with_pool(policy, **options)


def with_pool(policy: Policy, **options: Any) -> L2P:
    strategy = L2P(**options)
    strategy.setup_model(policy, seed=5)
    with torch.no_grad():
        for parameter in policy.added.values():
            parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    policy.eval()
    return strategy


def small(vocab: int = 64, width: int = 32) -> Policy:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
    )
    base = AutoModelForCausalLM.from_config(config)
    base.requires_grad_(False)
    return Policy(attach_lora(base, LoraOptions(r=2), seed=0))


def chosen(policy: Policy, prompt: list[int], top_k: int) -> list[int]:
    """Prompts nearest to the mean embedding of a prompt, in float64 and one by one."""
    table = policy.base.get_input_embeddings().weight.detach().double()
    query = table[prompt].mean(0)
    keys = policy.added["prompt_keys"].detach().double()
    distances = [1 - float(query @ key / (query.norm() * key.norm())) for key in keys]
    return sorted(range(len(keys)), key=lambda i: distances[i])[:top_k]


def embedded(policy: Policy, prompt: list[int], tokens: list[int], top_k: int) -> torch.Tensor:
    """(1, length, d): the chosen prompts' vectors, then the embeddings of tokens."""
    vectors = policy.added["prompts"][chosen(policy, prompt, top_k)].flatten(0, 1)
    return torch.cat([vectors, policy.base.get_input_embeddings().weight[tokens]]).unsqueeze(0)


def expected(policy: Policy, rows: list[Row], top_k: int) -> torch.Tensor:
    """Each response alone behind its chosen prompts and its prompt, from the logits of the base's own forward."""
    logps = []
    for row in rows:
        for response in row.responses:
            inputs = embedded(policy, list(row.prompt), [*row.prompt, *response], top_k)
            logits = policy.base(inputs_embeds=inputs).logits[0].double().log_softmax(-1)
            start = inputs.shape[1] - len(response) - 1
            logps.append(sum(logits[start + i, token] for i, token in enumerate(response)))
    return torch.stack(logps)


def laid_out(policy: Policy, rows: list[Row], layout: RowLayout) -> Batch:
    return collate([policy.prefixed(row) for row in rows], layout=layout, pad_token_id=0)


# Reading


def test_every_layout_reads_the_prompts_that_suit_each_row() -> None:
    policy, strategy = bundled(top_k=3, prompt_length=2)
    assert len({tuple(chosen(policy, list(row.prompt), 3)) for row in ROWS}) == 3, "the case must tell rows apart"
    with torch.no_grad():
        for layout in (RowLayout.packed, RowLayout.shared, RowLayout.concatenated):
            logps = policy(laid_out(policy, ROWS, layout))
            torch.testing.assert_close(logps.double(), expected(policy, ROWS, 3), rtol=1e-5, atol=2e-5)
            assert strategy.pool.distances.shape == (6 if layout is RowLayout.concatenated else 3, 3)


def test_the_reference_reads_no_prompts() -> None:
    policy = small()
    row = Row([5, 9, 11], [[7, 3], [8, 8, 4]])
    with torch.no_grad():
        before = policy(laid_out(policy, [row], RowLayout.concatenated))
        with_pool(policy)
        with policy.without_adapter():
            assert torch.equal(policy(laid_out(policy, [row], RowLayout.concatenated)), before)
        assert not torch.allclose(policy(laid_out(policy, [row], RowLayout.concatenated)), before)


def test_generation_is_what_whole_forward_passes_give_token_by_token() -> None:
    """No cache, no padding: the argmax behind chosen prompts, prompt and what was generated so far."""
    policy, _ = bundled(top_k=3, prompt_length=2)
    tokenizer = load_tokenizer(BUNDLED)
    prompts = [list(row.prompt) for row in ROWS]
    got = generate(policy, policy, prompts, tokenizer, batch_size=3, max_new_tokens=6)
    for prompt, text in zip(prompts, got, strict=True):
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 6 and tokenizer.eos_token_id not in answer:
                inputs = embedded(policy, prompt, [*prompt, *answer], 3)
                answer.append(int(policy.base(inputs_embeds=inputs).logits[0, -1].argmax()))
        assert text == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert len(set(got)) == 3


def test_selection_by_hand() -> None:
    """Token 1 is (4, 0) and token 2 is (0, 4): the prompt 1 1 2 has the query (8, 4) / 3.

    Its cosines with the keys (1, 0), (0, 1), (-1, 0), (1, 1) are 2, 1, -2 and 3 / sqrt(2), each over sqrt(5): 0.89443,
    0.44721, -0.89443, 0.94868. Prompt 3 is nearest, then 0. Where prompt 3 counts three times as far, 0.15396 against
    0.10557, it is the other way round.
    """
    policy = small(vocab=8, width=2)
    strategy = with_pool(policy, pool_size=4, top_k=2)
    with torch.no_grad():
        policy.base.get_input_embeddings().weight[1:3] = torch.tensor([[4.0, 0], [0, 4]])
        policy.added["prompt_keys"].copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [1, 1]]))
    assert policy.prefix == tuple(range(8, 18))
    queries = strategy.pool.queries([[1, 1, 2]])
    torch.testing.assert_close(queries, torch.tensor([[8 / 3, 4 / 3]]))
    selected, distances = strategy.pool.select(queries, penalised=False)
    assert selected.tolist() == [[3, 0]]
    torch.testing.assert_close(distances, torch.tensor([[0.05132, 0.10557]]), rtol=0, atol=1e-5)
    strategy.pool.penalty[3] = 3
    assert strategy.pool.select(queries, penalised=True)[0].tolist() == [[0, 3]]
    assert strategy.pool.select(queries, penalised=False)[0].tolist() == [[3, 0]]


# Training


def test_gradients_reach_selected_prompts_and_through_the_pull_selected_keys() -> None:
    """With the small operations replaced, as in a run: the frozen adapter is what their backward passes must cope with."""
    policy, strategy = bundled(top_k=2, pool_size=6, prompt_length=2)
    row = ROWS[0]
    used = chosen(policy, list(row.prompt), 2)
    unused = [i for i in range(6) if i not in used]
    prompts, keys = policy.added["prompts"], policy.added["prompt_keys"]
    by_hand = torch.autograd.grad(expected(policy, [row], 2).sum(), prompts)[0]
    policy.prefix, prefix = (), policy.prefix  # the probe of choose_operations is made before there is a pool
    choose_operations(policy, CPU)
    policy.prefix = prefix
    logps = policy(laid_out(policy, [row], RowLayout.packed))
    of_logps = torch.autograd.grad(logps.sum(), [prompts, keys], allow_unused=True, retain_graph=True)
    assert of_logps[1] is None
    torch.testing.assert_close(of_logps[0], by_hand, rtol=1e-3, atol=1e-5)
    assert of_logps[0][used].abs().amax((1, 2)).min() > 0
    assert not of_logps[0][unused].any()

    pull = strategy.pair_terms(context(policy, []), seen(row, logps))["pull"]
    of_pull = torch.autograd.grad(pull.sum(), [prompts, keys], allow_unused=True)
    assert of_pull[0] is None
    assert of_pull[1][used].abs().amax(1).min() > 0
    assert not of_pull[1][unused].any()
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == ["added.prompts", "added.prompt_keys"]


def test_a_pair_on_two_lines_counts_once() -> None:
    policy, strategy = bundled()
    terms = []
    for layout in (RowLayout.shared, RowLayout.concatenated):
        logps = policy(laid_out(policy, ROWS, layout))
        terms.append(strategy.pair_terms(context(policy, []), seen(*ROWS, logps=logps))["pull"])
    assert terms[0].shape == (3,)
    torch.testing.assert_close(terms[0], terms[1])


def seen(*rows: Any, logps: torch.Tensor | None = None) -> Seen:
    """What ``pair_terms`` looks at: how many pairs there are."""
    pairs = [SimpleNamespace(prompt=row.prompt) for row in rows if isinstance(row, Row)]
    return Seen(pairs, None, logps, None)  # type: ignore[arg-type]


def context(policy: Policy, prompts: list[list[int]]) -> Context:
    task: Any = SimpleNamespace(train=[Pair("", prompt, [1], [2], "", "", "") for prompt in prompts])
    run: Any = SimpleNamespace(policy=policy)
    return Context(run, task, 0, "sft")


def train_task(policy: Policy, strategy: L2P, prompts: list[list[int]]) -> set[int]:
    """Sixty steps on a task whose answers are all alike; returns the prompts that its rows read while it trained."""
    where, read = context(policy, prompts), set()
    strategy.begin_stage(where)
    optimizer = torch.optim.AdamW(policy.added.values(), lr=0.01, weight_decay=0.0)
    policy.train()
    rows = [Row(prompt, [[3, 4]]) for prompt in prompts]
    for _ in range(60):
        logps = policy(laid_out(policy, rows, RowLayout.shared))
        loss = -logps.mean() + strategy.pair_terms(where, seen(*rows, logps=logps))["pull"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        read |= set(strategy.pool.select(strategy.pool.queries(prompts), penalised=True)[0].flatten().tolist())
    strategy.end_task(where)
    policy.eval()
    return read


def draw_prompts(low: int, seed: int) -> list[list[int]]:
    """A task's prompts: eight tokens that all of them begin with, and four drawn from twenty."""
    drawn = torch.randint(low, low + 20, (8, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[*range(low, low + 8), *rest] for rest in drawn]


def top(policy: Policy, prompts: list[list[int]]) -> set[int]:
    return {i for prompt in prompts for i in chosen(policy, prompt, 3)}


def nearness(policy: Policy, strategy: L2P, numbers: set[int], prompts: list[list[int]]) -> float:
    """Mean cosine of some keys with a task's queries."""
    keys = policy.added["prompt_keys"].detach()[sorted(numbers)]
    return float(cosine_similarity(keys[:, None], strategy.pool.queries(prompts)[None], dim=-1).mean())


def test_keys_of_different_tasks_separate() -> None:
    """The paper's property, on prompts from two halves of a vocabulary, with the plain selection of eq. 3.

    A key is pulled to the queries that select it. At the start both tasks select four prompts in common. After both, no
    held-out row of one selects a prompt of the other; the keys that a task selects have come nearer to its queries, and are
    nearer to them than to the other's.
    """
    policy = small()
    strategy = with_pool(policy, top_k=3)
    strategy.setup(context(policy, []).run)
    first, second = draw_prompts(5, seed=1), draw_prompts(34, seed=2)
    held_out = draw_prompts(5, seed=3), draw_prompts(34, seed=4)
    assert len(top(policy, first) & top(policy, second)) == 4
    train_task(policy, strategy, first)
    train_task(policy, strategy, second)
    own = [top(policy, prompts) for prompts in held_out]
    assert not own[0] & own[1]
    now = [[nearness(policy, strategy, numbers, prompts) for prompts in held_out] for numbers in own]
    assert now[0][0] > now[0][1] + 0.3
    assert now[1][1] > now[1][0] + 0.3
    with_pool(fresh := small(), top_k=3)
    for number, prompts in enumerate(held_out):
        assert now[number][number] > nearness(fresh, strategy, own[number], prompts) + 0.3


@pytest.mark.parametrize(("diversity", "shared"), [(0.0, True), (1.0, False)])
def test_diversity_sends_a_task_to_prompts_that_no_task_has_used(diversity: float, shared: bool) -> None:
    """Two tasks with the same prompt, read with three prompts of the pool: these have a third of the selections each.

    Without the penalty the second task trains them too, with it three of the seven whose share is 0.
    """
    policy = small()
    strategy = with_pool(policy, top_k=3, diversity=diversity)
    strategy.setup(context(policy, []).run)
    prompts = [draw_prompts(5, seed=1)[0]] * 8
    before = train_task(policy, strategy, prompts)
    assert sorted(strategy.selections.tolist()) == [0.0] * 7 + [8.0] * 3
    strategy.load_state_dict(strategy.state_dict())
    assert len(before) == 3
    assert bool(before & train_task(policy, strategy, prompts)) is shared


# Runs


def test_a_run_leaves_the_adapter_alone_and_is_scored_again_alike(tmp_path: Path) -> None:
    run = train_here(
        tmp_path / "run",
        "strategy=l2p_released",
        "data.max_train=8",
        "data.max_eval=4",
        "sft.epochs=1",
        "preference.epochs=1",
        "evaluation.metrics=[mean_log_sigmoid,chosen_nll]",
    )
    base = load_base(BUNDLED, {"zero_optimization": {"stage": 0}})
    left = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, factor in named_factors(attach_lora(base, LoraOptions(), seed=0)):
        assert torch.equal(left[saved_name(name)], factor)
    tasks = sorted((run / "tasks").iterdir())
    added = [load_file(task / "adapter" / "added.safetensors") for task in tasks]
    assert {name: list(value.shape) for name, value in added[0].items()} == {"prompts": [10, 5, 192], "prompt_keys": [10, 192]}
    assert not torch.equal(added[0]["prompts"], added[1]["prompts"])
    assert not torch.equal(added[0]["prompt_keys"], added[1]["prompt_keys"])
    rescore(run, [])
    matrices = [json.loads((run / where / "scores.json").read_text())["metrics"] for where in ("", "rescored")]
    for metric in matrices[0]:
        ours, again = (torch.tensor(matrix[metric]["matrix"][1]) for matrix in matrices)
        torch.testing.assert_close(ours, again, rtol=1e-5, atol=1e-6)
    for words in ((), ("--merge",)):  # an adapter without the prompts would be the bare base
        ended = export(run, tmp_path / "out", *words)
        assert (ended.code, ended.err.count("\n")) == (2, 1) and "trained more than LoRA" in ended.err
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["strategy.top_k=11"], r"strategy\.pool_size=10: must be at least strategy\.top_k, 11"),
        (["strategy.prompt_length=0"], r"strategy\.prompt_length=0: must be at least 1"),
        (["strategy.pull=-1"], r"strategy\.pull=-1\.0: must be 0 or more"),
        (["zero=3"], r"strategy=l2p does not run with zero=3"),
    ],
)
def test_what_cannot_run_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        build(compose_config("+sequence=six_domains", "strategy=l2p", *overrides))


def test_the_prior_follows_the_pool_to_another_device() -> None:
    """The policy is moved after the pool is made; on the device without storage a tensor left behind is an error."""
    policy, strategy = bundled(diversity=1.0)
    strategy.pool.penalty = torch.full((strategy.pool_size,), 0.5)
    policy.to("meta")
    selected, distances = strategy.pool.select(torch.empty(3, 192, device="meta"), penalised=True)
    assert selected.shape == distances.shape == (3, strategy.top_k)
