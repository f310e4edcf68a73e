"""The policy: a causal language model with an adapter, as a function from batches to response log-probabilities."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from torch import nn

from lifealign.data.batch import Batch, Row, RowLayout, collate
from lifealign.errors import UserError
from lifealign.kernels import sequence_logps
from lifealign.models import attention, flex
from lifealign.models.lean import ReadPositions, replace_small_operations
from lifealign.runtime import distributed
from lifealign.runtime.terminal import console

log = logging.getLogger(__name__)

PARITY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest difference a token, in nats, between two ways to the same log-probability; a wrong mask is off by far more."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Largest relative difference of two gradients of the head; float32 allows for a card's tf32."""


class Policy(nn.Module):
    """Wraps a PEFT model so that one forward call yields log-probabilities and never a tensor of all logits.

    The body runs on all positions; the output head, and most of the last layer, on those that predict a response token.
    The head is read as a weight, not called, so what a model does beside the matrix product (soft cap, scaling) is taken
    from its configuration, and :func:`choose_layout` compares the outcome with the model's own logits before anything is
    trained.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.layout = RowLayout.concatenated  # set by choose_layout
        self.head_impl: str | None = None  # None: the kernel that suits the device; set by choose_head
        self.prefix: tuple[int, ...] = ()  # ids that the adapted policy reads in front of every prompt
        self.added = nn.ParameterDict()  # what a strategy trains beside LoRA
        self.read_positions = ReadPositions(self.base.get_decoder())
        for parameter in self.base.get_output_embeddings().parameters():
            if hasattr(parameter, "ds_id"):  # ZeRO-3 gathers for a module what is its own, or declared like this
                deepspeed.zero.register_external_parameter(self, parameter)

    @property
    def base(self) -> nn.Module:
        """The transformers model with LoRA layers in place."""
        return self.model.get_base_model()

    @property
    def dtype(self) -> torch.dtype:
        return self.base.get_input_embeddings().weight.dtype

    def forward(self, batch: Batch) -> torch.Tensor:
        """(num_sequences,) float32 log-probability of each response, summed over its tokens."""
        with self.read_positions.only(batch.read):
            hidden = self.base.get_decoder()(batch.input_ids, use_cache=False, **_attention_inputs(batch)).last_hidden_state
        predicting = hidden.flatten(0, 1)[batch.predictors]
        config, head = self.base.config.get_text_config(), self.base.get_output_embeddings()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        return sequence_logps(
            predicting if scale == 1 else predicting * scale,
            head.weight,
            batch.targets,
            batch.sequence_ids,
            batch.num_sequences,
            bias=head.bias,
            softcap=getattr(config, "final_logit_softcapping", None),
            impl=self.head_impl,
        )

    def prefixed(self, row: Row) -> Row:
        """A row as the policy reads it: behind its prefix, if it has one."""
        return row._replace(prompt=[*self.prefix, *row.prompt]) if self.prefix else row

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the policy is the reference: the base alone."""
        prefix, self.prefix = self.prefix, ()
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self.prefix = prefix
            for parameter, is_trained in trained:  # PEFT takes every adapter that comes back to be trained
                parameter.requires_grad_(is_trained)


def gathered(parameters: list[nn.Parameter], *, modifier_rank: int | None = None) -> Any:
    """Context in which parameters stand whole on every rank; changes that ``modifier_rank`` makes are kept.

    Parameters that are not partitioned (every stage but ZeRO-3) are left as they are.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank) if partitioned else nullcontext()


def _attention_inputs(batch: Batch) -> dict[str, Any]:
    """What tells attention who sees whom."""
    if not batch.needs_mask:
        # Positions run from 0 on and are left out: transformers would take the zeros of padding for packed sequences.
        return {}
    if batch.layout is RowLayout.packed:
        # A mask of four dimensions keeps transformers from making one of its own; on a CPU nothing reads it.
        if batch.input_ids.is_cuda:
            return {"position_ids": batch.position_ids, "attention_mask": flex.block_mask(batch.spans, batch.input_ids.device)}
        return {
            "position_ids": batch.position_ids,
            "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool),
            "packing": attention.Packing(batch.spans),
        }
    return {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask()}


def choose_head(policy: Policy, device: torch.device) -> None:
    """Leave the head to the kernel that suits the device if it proves itself here, else to the torch implementation.

    Only the forward pass can be held against the model's logits (:func:`choose_layout`). A kernel compiled for a card that
    nobody has tried must not train with gradients that nobody has seen, so those are compared on this very device, for a few
    tokens.
    """
    if device.type == "cpu":
        return  # the torch implementation already
    problem = _agreed(_head_problem(policy, None, device))
    if problem is not None:
        _tell(f"the fused head is not used, the torch implementation is: {problem}")
        policy.head_impl = "chunked"


def _head_problem(policy: Policy, impl: str | None, device: torch.device) -> str | None:
    """How the gradient of an implementation differs from the reference's, on random numbers of the model's width."""
    config = policy.base.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, policy.dtype)  # noqa: E731
    tokens, vocab, width = 65, min(config.vocab_size, 4096), config.hidden_size
    hidden, weight = draw(tokens, width) / width**0.5, draw(vocab, width)
    targets = torch.randint(vocab, (tokens,), generator=generator).to(device)
    sequences = (torch.arange(tokens) // 22).to(device)
    softcap, gradients = getattr(config, "final_logit_softcapping", None), []
    try:
        for name in (impl, "reference"):
            leaf = hidden.clone().requires_grad_()
            logps = sequence_logps(leaf, weight, targets, sequences, 3, softcap=softcap, impl=name)
            (logps * torch.tensor([1.0, -2.0, 3.0], device=device)).sum().backward()
            gradients.append(leaf.grad.double())
        off = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    except Exception as error:  # whatever keeps a kernel from running here, the torch implementation does not need it
        return _said(error)
    return None if off < GRADIENT_TOLERANCE[policy.dtype] else f"its gradient is off by {off:.2g}"


def choose_layout(policy: Policy, wanted: RowLayout, *, longest_row: int, device: torch.device) -> None:
    """Decide how rows are laid out, and prove on the loaded model that log-probabilities come out right.

    ``auto`` takes the first layout that does: packed (attention piece by piece on a CPU, FlexAttention on a card), then
    shared, then concatenated. Must run on every rank, with the adapter still zero.

    Raises:
        UserError: where the fast head disagrees with the model's own logits, or the layout that was asked for does.
    """
    apart = _deviation(policy, RowLayout.concatenated, device)
    if apart:
        log.warning("the last layer is computed at all positions: %s", apart)
        policy.read_positions.enabled = False
        apart = _deviation(policy, RowLayout.concatenated, device)
    if apart:
        raise UserError(
            f"model.path: the output head of {type(policy.base).__name__} is not a plain linear map; {apart}, so this "
            "architecture is not supported"
        )
    for layout in (RowLayout.packed, RowLayout.shared) if wanted is RowLayout.auto else (wanted,):
        problem = _layout_problem(policy, layout, longest_row, device)
        if problem is None:
            policy.layout = layout
            return
        if wanted is not RowLayout.auto:
            raise UserError(f"model.row_layout={wanted.value}: {problem}; use model.row_layout=concatenated")
        _tell(f"rows cannot be {layout.value}: {problem}")
    _tell("pairs take the concatenated path")
    policy.layout = RowLayout.concatenated


def _layout_problem(policy: Policy, layout: RowLayout, longest_row: int, device: torch.device) -> str | None:
    if layout is RowLayout.concatenated:
        return None
    problem = _attention_window_problem(policy, longest_row)
    if problem is None and layout is RowLayout.packed:
        problem = _agreed(_packing_problem(policy, device))
    if problem is not None or layout is not RowLayout.packed:
        return problem or _deviation(policy, layout, device)
    before = policy.base.config._attn_implementation
    policy.base.set_attn_implementation(flex.NAME if device.type == "cuda" else attention.NAME)
    problem = _deviation(policy, layout, device)
    if problem is not None:
        policy.base.set_attn_implementation(before)
    return problem


def _packing_problem(policy: Policy, device: torch.device) -> str | None:
    """Why attention over packed rows cannot be used; on a card it is compiled there and then, and proves itself."""
    config = policy.base.config.get_text_config()
    if policy.base.config._attn_implementation not in ("sdpa", attention.NAME, flex.NAME):
        return "the model does not run on SDPA attention"
    if getattr(config, "attention_dropout", 0):
        return f"the model has attention dropout ({config.attention_dropout})"
    if device.type != "cuda":
        return None
    heads = config.num_attention_heads
    try:
        off = flex.kernel_error(
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=policy.dtype,
            device=device,
        )
    except Exception as error:  # whatever keeps the kernel from running here, another layout does not need it
        return f"FlexAttention does not run: {_said(error)}"
    return None if off < GRADIENT_TOLERANCE[policy.dtype] else f"FlexAttention is off by {off:.2g}"  # a NaN is off too


@torch.no_grad()
def choose_operations(policy: Policy, device: torch.device) -> None:
    """On a CPU, replace small operations by faster ones (``lifealign.models.lean``) unless that changes log-probabilities.

    What is compared is the forward pass with the adapter still zero; their backward passes are a matter of the tests.
    """
    if device.type != "cpu":
        return
    batch = _probe(policy, policy.layout)
    expected = policy(batch)
    take_back = replace_small_operations(policy.base)
    try:
        problem = _difference(policy, policy(batch), expected)
    except Exception as error:  # whatever they do not suit, transformers' own do
        problem = _said(error)
    if problem is not None:
        log.warning("small operations stay transformers' own: %s", problem)
        take_back()


@torch.no_grad()
def _deviation(policy: Policy, layout: RowLayout, device: torch.device) -> str | None:
    """How far log-probabilities under a layout are off those from the model's own logits, where that is too far."""
    expected = _logps_from_logits(policy, _probe(policy, RowLayout.concatenated).to(device))
    try:
        got = policy(_probe(policy, layout).to(device))
        problem = _difference(policy, got, expected)
    except Exception as error:  # an architecture that cannot be called like this can be called otherwise
        problem = _said(error)
    return _agreed(problem)


def _tell(slower: str) -> None:
    """What costs speed is told in the terminal, too: nobody looks for it in a log."""
    log.warning("%s", slower)
    console.print(slower, markup=False)


def _agreed(problem: str | None) -> str | None:
    """The first problem of any rank, on every rank: all must take the same way, or they wait for each other for ever."""
    return next((p for p in distributed.gather_objects(problem) if p is not None), None)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


PROBE = ((7, (5, 9)), (3, (11, 2)))
"""Tokens of two prompts and of their responses, short and uneven."""


def _probe(policy: Policy, layout: RowLayout) -> Batch:
    """Two rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocab = policy.base.config.get_text_config().vocab_size
    draw = lambda n: torch.randint(vocab, (n,), generator=generator).tolist()  # noqa: E731
    rows = [Row(draw(prompt), [draw(n) for n in responses]) for prompt, responses in PROBE]
    return collate(rows, layout=layout, pad_token_id=0)


def _difference(policy: Policy, got: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What is wrong with log-probabilities of the probe, if they are too far off."""
    lengths = torch.tensor([n for _, responses in PROBE for n in responses])
    off = ((got - expected).abs().cpu() / lengths).max()
    return None if off < PARITY_TOLERANCE[policy.dtype] else f"log-probabilities are off by {off:.2g} a token"


def _attention_window_problem(policy: Policy, longest_row: int) -> str | None:
    """A sliding window counts positions along the row, and so would cut a response off from its prompt."""
    config = policy.base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    used = "sliding_attention" in layers if layers else getattr(config, "use_sliding_window", True)
    if window and used and window < longest_row:
        return f"the attention window of {window} tokens is shorter than the longest row, {longest_row}"
    return None


def _logps_from_logits(policy: Policy, batch: Batch) -> torch.Tensor:
    """The same log-probabilities from the model's own logits; (num_sequences,)."""
    logits = policy.base(input_ids=batch.input_ids, use_cache=False).logits.float().flatten(0, 1)[batch.predictors]
    token_logps = logits.log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
    return token_logps.new_zeros(batch.num_sequences).index_add_(0, batch.sequence_ids, token_logps)
