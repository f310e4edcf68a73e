"""Distillation from the old policy's own answers: what is sampled, and what is added to the loss."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import QUICK, compose_config, train_here
from test_lwf import rows

from lifealign.config import build, resolved
from lifealign.data.batch import collate
from lifealign.errors import UserError
from lifealign.evaluation.generation import sample
from lifealign.lifelong import Lifelong
from lifealign.models.adapter import factor_shapes, write_factors
from lifealign.models.scoring import pair_key, pair_row
from lifealign.runtime import distributed
from lifealign.runtime.options import TrackingMode, TrackingOptions
from lifealign.runtime.tracking import Tracker
from lifealign.strategies import Context, Seen, State, seeded_generator
from lifealign.strategies.kl import Distillation

PROMPTS, LONGEST = 5, 7


@pytest.fixture(scope="module")
def lifelong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lifelong]:
    """A run of which nothing is trained; its adapter is noise, and its model would generate coldly by itself."""
    chosen = ("strategy=kl", f"strategy.prompts={PROMPTS}", f"strategy.max_new_tokens={LONGEST}", "strategy.strength=2")
    composed = compose_config(*QUICK, *chosen, "evaluation.batch_size=2")
    folder = tmp_path_factory.mktemp("run")
    distributed.start()
    with Tracker(TrackingOptions(mode=TrackingMode.disabled), folder, {}) as tracker:
        made = Lifelong(build(composed), folder, tracker, resolved(composed))
        noise = {
            name: 0.05 * torch.randn(shape, generator=seeded_generator(name))
            for name, shape in factor_shapes(made.policy.model).items()
        }
        write_factors(made.policy.model, noise, dict.fromkeys(noise, 0))
        made.policy.base.generation_config.top_k = 1
        made.policy.base.generation_config.repetition_penalty = 5.0
        made.policy.base.generation_config.min_p = 0.5
        yield made


def begun(lifelong: Lifelong, task_number: int = 1, stage: str = "") -> tuple[Distillation, Context]:
    strategy = lifelong.config.strategy
    assert isinstance(strategy, Distillation)
    strategy.setup(lifelong.run_info)
    context = Context(lifelong.run_info, lifelong.tasks[1], task_number, stage)
    strategy.begin_task(context)
    return strategy, context


def next_token_probabilities(lifelong: Lifelong, prompt: list[int]) -> torch.Tensor:
    """(vocab,) float64 of the policy, from the model's own logits."""
    with torch.no_grad():
        return lifelong.policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(0)


# -- what is sampled ---------------------------------------------------------------------------------------------------


def test_samples_are_the_policys_own(lifelong: Lifelong) -> None:
    """First tokens of 600 answers to one prompt: the share of each of the three likeliest tokens, and of all but the ten
    likeliest, lies within 4.5 standard errors of the policy's probability. The model's own settings (the likeliest token,
    a penalty, a floor on probabilities) have no say, and stay as they are.
    """
    prompt, count = lifelong.tasks[0].train[0].prompt, 600
    options = {"batch_size": 200, "max_new_tokens": 1, "seed": 3}
    drawn = sample(lifelong.policy, lifelong.policy, [prompt] * count, lifelong.tokenizer, **options)
    assert lifelong.policy.base.generation_config.min_p == 0.5
    tokens = torch.tensor([answer[0] for answer in drawn])
    probabilities = next_token_probabilities(lifelong, prompt)
    likely = probabilities.topk(10).indices
    events = [(tokens == t, probabilities[t]) for t in likely[:3]]
    events.append((~torch.isin(tokens, likely), 1 - probabilities[likely].sum()))
    for happened, probability in events:
        error = math.sqrt(probability * (1 - probability) / count)
        assert abs(happened.double().mean() - probability) < 4.5 * error
    assert (~torch.isin(tokens, likely)).any()


def test_answers_are_of_the_tasks_prompts_and_bounded(lifelong: Lifelong) -> None:
    strategy, context = begun(lifelong)
    keys = {pair_key(pair).hex() for pair in context.task.train}
    assert len(strategy.answers) == PROMPTS < len(keys)
    assert strategy.answers.keys() <= keys
    ends = {lifelong.tokenizer.eos_token_id}
    for answer in strategy.answers.values():
        assert 1 <= len(answer) <= LONGEST
        assert not ends & set(answer[:-1])
        assert len(answer) == LONGEST or answer[-1] in ends


def test_answers_repeat_whatever_was_drawn_before(lifelong: Lifelong) -> None:
    """And leave the numbers that are drawn afterwards as they were. Another place in the run draws others."""
    torch.manual_seed(1)
    first = begun(lifelong)[0].answers
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.rand(3).equal(after)
    again = begun(lifelong)[0].answers
    assert again == first
    assert begun(lifelong, task_number=2)[0].answers != first


def test_the_first_task_has_nothing_to_keep(lifelong: Lifelong) -> None:
    strategy, context = begun(lifelong, task_number=0)
    assert strategy.answers == {}
    assert strategy.pair_terms(context, Seen(context.task.train[:1], None, torch.zeros(2), torch.zeros(1))) == {}  # type: ignore[arg-type]


# -- what is added -----------------------------------------------------------------------------------------------------


def oracle(lifelong: Lifelong, prompt: list[int], answer: list[int]) -> float:
    """Negative log-likelihood of an answer from the model's own logits, token after token, in float64."""
    nats = 0.0
    for position, token in enumerate(answer):
        nats -= math.log(next_token_probabilities(lifelong, [*prompt, *answer[:position]])[token])
    return nats


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_terms_are_the_mean_over_tokens_of_the_answers(stage: str, lifelong: Lifelong) -> None:
    """Their mean over all pairs of the task is strength times nats over tokens, however pairs are batched; and it is learned:
    a step against the gradient makes the answers likelier.
    """
    strategy, context = begun(lifelong, stage=stage)
    pairs = context.task.train
    nats = tokens = 0.0
    for pair in pairs:
        answer = strategy.answers.get(pair_key(pair).hex(), [])
        nats, tokens = nats + oracle(lifelong, pair.prompt, answer), tokens + len(answer)
    terms = []
    for start in range(0, len(pairs), 3):
        share = pairs[start : start + 3]
        batch = collate([pair_row(pair) for pair in share], layout=lifelong.policy.layout, pad_token_id=0)
        terms.append(strategy.pair_terms(context, Seen(share, batch, torch.zeros(1), torch.zeros(1)))["kl"])
    found = torch.cat(terms)
    answered = [pair_key(pair).hex() in strategy.answers for pair in pairs]
    assert [bool(value) for value in found] == answered
    assert found.mean().item() == pytest.approx(2 * nats / tokens, rel=1e-4)
    lifelong.policy.zero_grad()
    found.mean().backward()
    gradients = {name: p.grad for name, p in context.run.trained().items() if p.grad is not None}
    assert gradients.keys() == context.run.trained().keys()
    assert sum(gradient.norm() for gradient in gradients.values()) > 0
    lifelong.policy.zero_grad()


def test_answers_survive_a_checkpoint(lifelong: Lifelong) -> None:
    strategy, _ = begun(lifelong)
    answers = strategy.answers
    state = State(json.loads(json.dumps(strategy.state_dict().values)))
    strategy.setup(lifelong.run_info)
    assert strategy.answers == {}
    strategy.load_state_dict(state)
    assert strategy.answers == answers


def test_a_run_holds_on_from_the_second_task_on(tmp_path: Path) -> None:
    """In both stages, and the answers become likelier with the strength that is given."""
    quick = ("strategy.prompts=16", "strategy.max_new_tokens=6", "strategy.strength=20", "evaluation.metrics=[chosen_nll]")
    found = rows(train_here(tmp_path / "run", "strategy=kl", *quick, "data.max_eval=2"))
    assert all(("kl" in row) == (row["task_number"] == 1) for row in found)
    assert {row["stage"] for row in found if "kl" in row} == {"sft", "preference"}
    values = [row["kl"] for row in found if "kl" in row and row["stage"] == "sft"]
    assert values[-1] < values[0]


@pytest.mark.parametrize("option", ["strength=-1", "strength=inf", "prompts=0", "max_new_tokens=0"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"strategy.{option.split('=')[0]}="):
        build(compose_config("+sequence=six_domains", "strategy=kl", f"strategy.{option}"))
