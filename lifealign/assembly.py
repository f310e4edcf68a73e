"""What a run, and whoever scores it again, is made of: the policy and the evaluator that a configuration describes."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lifealign.config import Config
from lifealign.data.tasks import Task
from lifealign.errors import UserError
from lifealign.evaluation.evaluate import Evaluator
from lifealign.evaluation.judge import Judge, judge_folder
from lifealign.models.loading import attach_lora, count_positions, enable_gradient_checkpointing, load_base
from lifealign.models.policy import Policy, choose_head, choose_layout, choose_operations
from lifealign.models.scoring import ReferenceLogps, pair_row
from lifealign.runtime import distributed
from lifealign.runtime.engine import deepspeed_config, inference_engine


def make_policy(config: Config, tasks: Sequence[Task]) -> Policy:
    """Load the base, attach a fresh adapter, and choose how rows are laid out."""
    base = load_base(config.model, deepspeed_config(config.zero))
    model = attach_lora(base, config.strategy.lora(config.model.lora, len(tasks)), seed=config.seed)
    policy = Policy(model)
    config.strategy.setup_model(policy, config.seed)
    check_positions(config, tasks)
    longest = max(policy.prefixed(pair_row(pair)).length for task in tasks for pair in [*task.train, *task.test])
    with inference_engine(policy, config.zero) as module:
        module.eval()
        choose_head(policy, distributed.device())
        choose_layout(policy, config.model.row_layout, longest_row=longest, device=distributed.device())
        choose_operations(policy, distributed.device())
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(model, zero_stage=config.zero.stage)
    return policy


def check_positions(config: Config, tasks: Sequence[Task]) -> None:
    """Refuse rows that are longer than what the base was made for, behind which it computes noise or nothing.

    Raises:
        UserError: naming what makes them shorter.
    """
    positions, evaluation, prefix = count_positions(config.model), config.evaluation, config.strategy.prefix_tokens
    if positions is None:
        return
    rows = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for task in tasks for p in [*task.train, *task.test]]
    if prefix + max(rows) > positions:
        raise UserError(
            f"model.path={config.model.path}: has {positions} positions, and the longest row has {prefix + max(rows)} tokens; "
            "lower data.max_prompt_tokens or data.max_response_tokens"
        )
    asked = max(len(p.prompt) for task in tasks for p in task.test[: evaluation.max_generations])
    if evaluation.generates and prefix + asked + evaluation.max_new_tokens > positions:
        raise UserError(
            f"model.path={config.model.path}: has {positions} positions, and the longest prompt with its answer may have "
            f"{prefix + asked + evaluation.max_new_tokens}; lower data.max_prompt_tokens or evaluation.max_new_tokens"
        )


def judged_tasks(config: Config) -> list[tuple[str, str | None]]:
    """Each task, and the task whose rows it reads, if that is another one: their criteria are what a judge goes by."""
    sources = config.sequence.sources
    return [(task, sources[task].of if task in sources else None) for task in config.sequence.tasks]


def make_evaluator(config: Config, policy: Policy, reference: ReferenceLogps, tokenizer: PreTrainedTokenizerBase) -> Evaluator:
    """What scores a run's tasks, with the judge that it names, if any.

    Raises:
        UserError: where the judge cannot be asked; before hours of training, and not after.
    """
    options, judge = config.evaluation, None
    if "judge" in options.metrics:
        judge = Judge(options.judge, judge_folder(config.cache.dir), dict(judged_tasks(config)))
    return Evaluator(policy, reference, tokenizer, options, beta=config.objective.beta, judge=judge)
