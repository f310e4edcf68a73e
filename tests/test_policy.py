"""Architectures differ in attention, head and scaling; what the policy makes of each is held against the model itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lifealign import kernels
from lifealign.data.batch import Row, RowLayout, collate
from lifealign.errors import UserError
from lifealign.models import lean
from lifealign.models import policy as policy_module
from lifealign.models.loading import attach_lora
from lifealign.models.options import LoraOptions
from lifealign.models.policy import Policy, choose_head, choose_layout, choose_operations

SMALL = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 64, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # a head with a bias
}
AWKWARD = {
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},  # its feed-forward network returns a tuple
    "nemotron": {},  # reads the attention mask itself
}
ROWS = [Row([5, 9, 11], [[7, 3], [8, 8, 4]]), Row([21, 6], [[40, 41, 42, 43], [2]])]


def build(kind: str, **settings: object) -> Policy:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SMALL, **(ARCHITECTURES | AWKWARD)[kind], **settings})
    base = AutoModelForCausalLM.from_config(config).eval()
    base.requires_grad_(False)
    for parameter in base.parameters():  # biases and norms start at constants, which would hide what they do
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Policy(attach_lora(base, LoraOptions(r=2), seed=0))


def expected(policy: Policy, rows: list[Row]) -> torch.Tensor:
    """Each response alone behind its prompt, from the logits of the model's own forward."""
    logps = []
    for row in rows:
        for response in row.responses:
            ids = torch.tensor([[*row.prompt, *response]])
            logits = policy.model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(row.prompt) - 1
            logps.append(sum(logits[start + i, token] for i, token in enumerate(response)))
    return torch.stack(logps)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_both_layouts_equal_the_models_own_logits(kind: str) -> None:
    policy = build(kind)
    choose_layout(policy, RowLayout.auto, longest_row=40, device=torch.device("cpu"))
    # Gemma 2's attention has a soft cap of its own, and no SDPA.
    assert policy.layout is (RowLayout.concatenated if kind == "gemma2" else RowLayout.packed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        for layout in {policy.layout, RowLayout.concatenated}:
            logps = policy(collate(ROWS, layout=layout, pad_token_id=0))
            torch.testing.assert_close(logps.double(), expected(policy, ROWS), rtol=1e-5, atol=1e-5)


def test_a_window_shorter_than_the_row_takes_the_concatenated_path(caplog: pytest.LogCaptureFixture) -> None:
    policy = build("mistral", sliding_window=32)
    choose_layout(policy, RowLayout.auto, longest_row=33, device=torch.device("cpu"))
    assert policy.layout is RowLayout.concatenated
    assert "the attention window of 32 tokens is shorter than the longest row, 33" in caplog.text
    choose_layout(policy, RowLayout.auto, longest_row=32, device=torch.device("cpu"))
    assert policy.layout is RowLayout.packed
    with pytest.raises(UserError, match=r"model\.row_layout=shared.*use model\.row_layout=concatenated"):
        choose_layout(policy, RowLayout.shared, longest_row=33, device=torch.device("cpu"))


def test_attention_that_ignores_the_mask_takes_the_concatenated_path() -> None:
    policy = build("llama")
    policy.base.set_attn_implementation("eager")  # adds a boolean mask as if it were a number
    choose_layout(policy, RowLayout.auto, longest_row=8, device=torch.device("cpu"))
    assert policy.layout is RowLayout.concatenated


def test_a_head_that_is_no_linear_map_is_refused() -> None:
    policy = build("llama")
    head = policy.base.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UserError, match="not a plain linear map"):
        choose_layout(policy, RowLayout.auto, longest_row=8, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "layout", "enabled"),
    [("llama", RowLayout.packed, True), ("gpt_oss", RowLayout.concatenated, False), ("nemotron", RowLayout.shared, True)],
)
def test_what_an_architecture_cannot_be_called_with_is_left_out(kind: str, layout: RowLayout, enabled: bool) -> None:
    policy = build(kind)
    choose_layout(policy, RowLayout.auto, longest_row=40, device=torch.device("cpu"))
    assert policy.layout is layout
    assert policy.read_positions.enabled is enabled
    with torch.no_grad():
        logps = policy(collate(ROWS, layout=layout, pad_token_id=0))
        torch.testing.assert_close(logps.double(), expected(policy, ROWS), rtol=1e-5, atol=1e-5)


def test_operations_that_change_the_outcome_are_taken_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = build("llama")
    with torch.no_grad():
        before = policy(collate(ROWS, layout=policy.layout, pad_token_id=0))
        monkeypatch.setattr(lean, "_norm_forward", lambda module, x: 2 * x)
        choose_operations(policy, torch.device("cpu"))
        assert "small operations stay transformers' own" in caplog.text
        # Not to the bit: a product may round otherwise where its operands lie elsewhere in memory.
        after = policy(collate(ROWS, layout=policy.layout, pad_token_id=0))
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "problem"), [("q_prj", "did you mean 'q_proj'"), ("lm_head", "is the output head, which stays frozen")]
)
def test_targets_that_cannot_be_trained_are_refused(target: str, problem: str) -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    with pytest.raises(UserError, match=problem):
        attach_lora(AutoModelForCausalLM.from_config(config), LoraOptions(target_modules=[target]), seed=0)


def test_rows_of_one_response_are_packed_too() -> None:
    """As in the supervised stage: each row is then one causal sequence."""
    policy = build("llama")
    choose_layout(policy, RowLayout.packed, longest_row=40, device=torch.device("cpu"))
    rows = [Row(row.prompt, row.responses[:1]) for row in ROWS]
    with torch.no_grad():
        logps = policy(collate(rows, layout=RowLayout.packed, pad_token_id=0))
        torch.testing.assert_close(logps.double(), expected(policy, rows), rtol=1e-5, atol=1e-5)


def test_a_head_that_cannot_run_or_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the Triton kernels cannot run outside their interpreter, and a wrong gradient is made up."""
    policy = build("llama")
    cpu = torch.device("cpu")
    assert policy_module._head_problem(policy, "chunked", cpu) is None
    assert "Error" in (policy_module._head_problem(policy, "triton", cpu) or "")

    def wrong(hidden: torch.Tensor, *arguments: object, impl: str | None, **options: object) -> torch.Tensor:
        return kernels.sequence_logps(hidden * (1 if impl == "reference" else 2), *arguments, impl="reference", **options)

    monkeypatch.setattr(policy_module, "sequence_logps", wrong)
    assert "its gradient is off by" in (policy_module._head_problem(policy, "chunked", cpu) or "")
    choose_head(policy, torch.device("meta"))  # stands for a card: whatever goes wrong there, training goes on in torch
    assert policy.head_impl == "chunked"
