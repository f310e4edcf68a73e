"""An exported folder opened again by transformers and PEFT alone, and held against the policy of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lifealign.config import Config
from lifealign.errors import UserError
from lifealign.models.adapter import load_adapter
from lifealign.models.loading import attach_lora, load_base, load_tokenizer, resolve_path
from lifealign.models.options import BaseDtype, ModelOptions, Quantization
from lifealign.models.policy import Policy
from lifealign.models.quantization import read_base
from lifealign.runtime import distributed
from lifealign.runtime.engine import ZeroOptions, deepspeed_config
from lifealign.runtime.files import read_json_lines

TOLERANCE = {BaseDtype.float32: 1e-3, BaseDtype.bfloat16: 0.1}
"""Largest mean difference of a row, in nats a token. In bfloat16 merging rounds each weight to 8 bits, which alone moves a
token by hundredths of a nat; the adapter that is not merged is held to the same and comes out far below."""

NOTHING = 1e-5
"""Nats a token below which an adapter is taken to change nothing, as a fresh one does."""

ROW_TOKENS = 256  # of a row, so that the check stays short whatever the rows are
RANDOM_TOKENS = 64  # of the row that no data decides


@dataclass(frozen=True)
class Reload:
    """What the check found, in nats a token."""

    rows: int
    drift: float  # between the exported model and the run's policy, in the mean over the worst row
    effect: float  # between the policy and the base without adapter, in the mean over all rows
    tolerance: float

    def line(self) -> str:
        return (
            f"loaded again: log-probabilities of {self.rows} rows differ from the run's by at most {self.drift:.2g} nats a "
            f"token (tolerance {self.tolerance:g}); the adapter moves them by {self.effect:.2g}"
        )


@dataclass(frozen=True)
class Probe:
    """Rows, and what the run's policy says of them."""

    turns: list[list[dict[str, str]]]  # conversations, for the tokenizer to write
    rows: list[list[int]]  # their token ids, and a last row that stands for no conversation
    wanted: list[torch.Tensor]  # (tokens - 1,) float32 for each row: log-probabilities under the policy
    base: list[torch.Tensor]  # the same without the adapter


def take_probe(adapter: Path, config: Config) -> Probe:
    """What an export of an adapter will be held against.

    Args:
        adapter: the run's, ``RUN_DIR/tasks/NN_NAME/adapter``; the rows are among the predictions beside it.

    Raises:
        UserError: where the base or its tokenizer cannot be loaded.
    """
    tokenizer, turns = load_tokenizer(config.model), _turns(adapter.parent / "predictions.jsonl")
    rows = [*_token_ids(tokenizer, turns), _random_row(len(tokenizer))]
    return Probe(turns, rows, *_policy_logps(adapter, config, rows))


def check_reload(folder: Path, probe: Probe, config: Config, *, merge: bool) -> Reload:
    """Compare what ``folder`` computes, without this package, with the run's policy. One model stands in memory at a time.

    Args:
        folder: what was exported: an adapter, or with ``merge`` whole weights.

    Raises:
        UserError: where tokens or log-probabilities differ, naming the difference.
    """
    if (
        _token_ids(AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code), probe.turns)
        != probe.rows[:-1]
    ):
        raise UserError(f"the exported tokenizer gives other tokens than that of model.path={config.model.path}")
    found = _exported_logps(folder, config, probe.rows, merge=merge)
    worst = max(_distance([a], [b]) for a, b in zip(found, probe.wanted, strict=True))
    reload = Reload(len(probe.rows), worst, _distance(probe.wanted, probe.base), _tolerance(config.model, merge=merge))
    _refuse(reload, _distance(found, probe.wanted), config, merge=merge)
    return reload


def merged_dtype(options: ModelOptions) -> torch.dtype:
    """Of merged weights: the base's, or bfloat16 where the base is in 4 bits."""
    quantised = options.quantization is not Quantization.none
    return torch.bfloat16 if quantised else getattr(torch, options.dtype.value)


def _tolerance(options: ModelOptions, *, merge: bool) -> float:
    return TOLERANCE[BaseDtype(str(merged_dtype(options)).removeprefix("torch."))] if merge else TOLERANCE[options.dtype]


def _refuse(reload: Reload, drift: float, config: Config, *, merge: bool) -> None:
    """``drift``: in the mean over all rows. A NaN is refused as well."""
    fix = "; export the adapter without --merge" if merge else ""
    if not reload.drift <= reload.tolerance:
        raise UserError(
            f"the exported model's log-probabilities differ from the run's by {reload.drift:.2g} nats a token, more than "
            f"the tolerance of {reload.tolerance:g}; nothing was written{fix}"
        )
    # An adapter may move log-probabilities by less than the tolerance, and then being near says nothing.
    if reload.effect > NOTHING and not drift < reload.effect:
        raise UserError(
            f"the exported model's log-probabilities differ from the run's by {drift:.2g} nats a token, and the adapter "
            f"itself moves them by {reload.effect:.2g} only: it is lost; nothing was written{fix}"
        )


def _turns(predictions: Path) -> list[list[dict[str, str]]]:
    """The first held-out row of each task that was scored, as a conversation; none where the file is not there."""
    first: dict[str, dict[str, Any]] = {}
    for row in read_json_lines(predictions) if predictions.exists() else []:
        first.setdefault(row["task"], row)
    pairs = [(row["prompt"], row["chosen"]) for row in first.values()]
    return [[{"role": "user", "content": p}, {"role": "assistant", "content": answer}] for p, answer in pairs]


def _token_ids(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """Ids of the rows as the chat template writes them, cut to the length of the check."""
    written = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:ROW_TOKENS] for text in written]


def _random_row(vocabulary: int) -> list[int]:
    """The same ids every time: a check with rows of the data alone would lean on a few common words."""
    return torch.randint(vocabulary, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


def _policy_logps(adapter: Path, config: Config, rows: Sequence[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of the run's policy, made as the run made it, and of its base without the adapter."""
    tasks = len(config.sequence.tasks)
    base = load_base(config.model, deepspeed_config(ZeroOptions()))
    policy = Policy(attach_lora(base, config.strategy.lora(config.model.lora, tasks), seed=config.seed))
    load_adapter(policy, adapter)
    policy.to(distributed.device()).eval()
    wanted = list(_logps(policy.model, rows))
    with policy.without_adapter():
        return wanted, list(_logps(policy.model, rows))


def _exported_logps(folder: Path, config: Config, rows: Sequence[list[int]], *, merge: bool) -> list[torch.Tensor]:
    """As whoever receives the folder loads it; merged weights in the dtype that they say they are in."""
    if merge:
        dtype, trust = merged_dtype(config.model), config.model.trust_remote_code
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust)
        if model.dtype != dtype:
            raise UserError(f"the exported weights are {model.dtype} and not {dtype}; nothing was written")
    else:
        model = PeftModel.from_pretrained(read_base(resolve_path(config.model), config.model), str(folder))
    return list(_logps(model.to(distributed.device()).eval(), rows))


@torch.no_grad()
def _logps(model: nn.Module, rows: Sequence[list[int]]) -> Iterator[torch.Tensor]:
    """(tokens - 1,) float32 on the CPU for each row: of every token behind the first, given those before it."""
    for row in rows:
        ids = torch.tensor([row], device=distributed.device())
        logits = model(input_ids=ids).logits[0, :-1].float()
        yield logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1).cpu()


def _distance(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Mean absolute difference over all tokens."""
    return (torch.cat(list(left)) - torch.cat(list(right))).abs().mean().item()
