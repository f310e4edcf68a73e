"""Layout of a batch by hand, and both layouts through real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from lifealign.data.batch import Batch, Row, RowLayout, collate, extent, length_buckets, padded
from lifealign.models import attention
from lifealign.models.policy import Policy

LAYOUTS = (RowLayout.packed, RowLayout.shared, RowLayout.concatenated)
ROWS = [Row([10, 11, 12], [[20, 21, 22], [30, 31]]), Row([13], [[40, 41], [50, 51, 52, 53]])]


def test_shared_prefix_by_hand() -> None:
    """Lines ``10 11 12 | 20 21 | 30`` and ``13 | 40 | 50 51 52``, padded to 6; last tokens of responses are left out.

    Positions of a response continue the prompt's: 3, 4 and again 3; 1 and again 1, 2, 3. Its first token is predicted
    at the last prompt token: flat 2 in the first line, flat 6 in the second. So 20 ← 2, 21 ← 3, 22 ← 4, 30 ← 2, 31 ← 5,
    40 ← 6, 41 ← 7, 50 ← 6, 51 ← 8 (where 50 stands), 52 ← 9, 53 ← 10.
    """
    batch = collate(ROWS, layout=RowLayout.shared, pad_token_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30], [13, 40, 50, 51, 52, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, -1]]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.position_ids[1, :5].tolist() == [0, 1, 1, 2, 3]
    assert batch.predictors.tolist() == [2, 3, 4, 2, 5, 6, 7, 6, 8, 9, 10]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31, 40, 41, 50, 51, 52, 53]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert (batch.num_sequences, batch.spans, batch.tokens) == (4, ((3, 2, 1), (1, 1, 3)), 11)
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.predictors, batch.targets)} == {torch.int64}


def test_attention_mask_by_hand() -> None:
    """Row = query, column = key. A response sees the prompt and its own past, never the other; prompts are causal.

    What padding sees does not matter, but it must see something (a row without a key is NaN), and nothing may see it.
    """
    mask = collate(ROWS, layout=RowLayout.shared, pad_token_id=0).attention_mask()
    assert (mask.dtype, tuple(mask.shape)) == (torch.bool, (2, 1, 6, 6))
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert mask[1, 0, :5].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
    ]
    assert mask[1, 0, 5].any()


def test_concatenated_by_hand() -> None:
    """Four lines of at most 5 (10 11 12 20 21): flat indices advance by 5 a line."""
    batch = collate(ROWS, layout=RowLayout.concatenated, pad_token_id=9)
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 20, 21],
        [10, 11, 12, 30, 9],
        [13, 40, 9, 9, 9],
        [13, 50, 51, 52, 9],
    ]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, -1], [0, 1, -1, -1, -1], [0, 1, 1, 1, -1]]
    for line, known in enumerate((5, 4, 2, 4)):
        assert batch.position_ids[line, :known].tolist() == list(range(known))
    assert batch.predictors.tolist() == [2, 3, 4, 7, 8, 10, 11, 15, 16, 17, 18]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31, 40, 41, 50, 51, 52, 53]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert (batch.num_sequences, batch.spans, batch.tokens) == (4, ((3, 2), (3, 1), (1, 1), (1, 3)), 15)
    assert not batch.needs_mask


def test_packed_by_hand() -> None:
    """One line of 11 tokens, ``10 11 12 | 20 21 | 30`` and, from 6 on, ``13 | 40 | 50 51 52``; no padding."""
    batch = collate(ROWS, layout=RowLayout.packed, pad_token_id=9)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 13, 40, 50, 51, 52]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]]
    assert batch.predictors.tolist() == [2, 3, 4, 2, 5, 6, 7, 6, 8, 9, 10]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31, 40, 41, 50, 51, 52, 53]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert (batch.num_sequences, batch.spans, batch.tokens) == (4, ((3, 2, 1), (1, 1, 3)), 11)
    assert batch.needs_mask


def test_padded_numbers_are_few_and_near() -> None:
    """Below 64 every number; from 64 to 127 each second, and so on: 32 numbers an octave, and less than 1/32 more."""
    assert [padded(n) for n in (1, 63, 64, 65, 127, 129, 647, 1271)] == [1, 63, 64, 66, 128, 132, 656, 1280]
    for octave in range(6, 16):
        numbers = {padded(n) for n in range(1 << octave, 2 << octave)}
        assert len(numbers) == 33 and max(numbers) == 2 << octave
    assert all(n <= padded(n) < n * 33 / 32 for n in range(1, 5000))


def test_packed_line_is_padded_by_a_row_that_nobody_reads() -> None:
    """69 tokens (40 + 9 + 19 and 1) become 70; 30 predictors stay 30, for below 64 every number is a padded one."""
    rows = [Row(list(range(40)), [[7] * 10, [8] * 20]), Row([1], [[2]])]
    batch = collate(rows, layout=RowLayout.packed, pad_token_id=9)
    assert (batch.tokens, batch.spans) == (69, ((40, 9, 19), (1, 0), (1,)))
    assert batch.input_ids[0, 68:].tolist() == [1, 9]
    assert batch.segments[0, 68:].tolist() == [0, -1]
    assert batch.read.tolist() == sorted({*batch.predictors.tolist()})
    assert extent(rows, RowLayout.packed) == (69, 70)


def test_positions_read_are_filled_up_from_the_front() -> None:
    """65 + 66 responses of a prompt of 3: predictors are its last token and 64 + 65 more, 130; 132 are computed."""
    batch = collate([Row([1, 2, 3], [[7] * 65, [8] * 66])], layout=RowLayout.packed, pad_token_id=9)
    assert batch.read.tolist() == list(range(132))
    alone = collate([Row([1], [[7] * 65, [8] * 66])], layout=RowLayout.packed, pad_token_id=9)
    assert alone.read.tolist() == list(range(132))  # with what there is of padding


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_response_of_one_token_takes_no_position(layout: RowLayout) -> None:
    """Two responses of one token are predicted at the last prompt token, and nothing else is computed."""
    batch = collate([Row([1, 2], [[3], [4]])], layout=layout, pad_token_id=0)
    assert batch.input_ids.unique(dim=0).tolist() == [[1, 2]]
    assert batch.targets.tolist() == [3, 4]
    assert batch.input_ids.flatten()[batch.predictors].tolist() == [2, 2]


def test_one_response_a_row_needs_no_mask() -> None:
    """SFT rows: both layouts are the same plain causal batch."""
    rows = [Row([1, 2], [[3]]), Row([4], [[5, 6, 7]])]
    shared, apart = (collate(rows, layout=s, pad_token_id=0) for s in (RowLayout.shared, RowLayout.concatenated))
    assert not shared.needs_mask
    assert torch.equal(shared.input_ids, apart.input_ids)
    assert torch.equal(shared.predictors, apart.predictors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", [Row([], [[1]]), Row([1], [[2], []])])
def test_nothing_to_predict_is_an_error(row: Row, layout: RowLayout) -> None:
    with pytest.raises(ValueError, match="needs a prompt and responses"):
        collate([Row([1], [[2], [3]]), row], layout=layout, pad_token_id=0)


def test_moving_keeps_everything() -> None:
    batch = collate(ROWS, layout=RowLayout.shared, pad_token_id=0)
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.is_meta
    assert moved.sequence_ids.is_meta
    assert (moved.num_sequences, moved.layout, moved.tokens) == (4, RowLayout.shared, 11)


def test_length_buckets_by_hand() -> None:
    assert list(length_buckets([3, 9, 5, 9, 1], 2)) == [[1, 3], [2, 0], [4]]
    assert list(length_buckets([], 2)) == []


SMALL: dict[str, Any] = {"vocab_size": 61, "num_hidden_layers": 2, "attn_implementation": "sdpa"}
SMALL |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
}


def make_policy(config: PretrainedConfig, targets: list[str]) -> Policy:
    """A random model with an adapter whose B is not zero, so that every factor has a gradient."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
            elif "layernorm" not in name and "ln_" not in name:
                parameter.mul_(8)  # far from uniform predictions
    return Policy(adapted).eval()


LENGTHS = ((9, 4, 11), (1, 7, 1), (5, 1, 3), (12, 6, 6), (10, 30, 21))
"""117 positions, of which 85 are read: a packed line and what is read of it are filled up."""


def random_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(1, 61, (n,), generator=generator).tolist()

    return [Row(draw(p), [draw(c), draw(r)]) for p, c, r in LENGTHS]


def logps_and_gradients(policy: Policy, logps: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each sequence pulls with its own weight, as a preference loss does."""
    factors = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    pull = torch.linspace(-1, 1.5, len(logps))
    return logps.detach(), dict(zip(factors, torch.autograd.grad(logps @ pull, list(factors.values())), strict=True))


def one_at_a_time(policy: Policy, rows: list[Row]) -> torch.Tensor:
    """The definition: every sequence alone through the model's own head, without padding, mask or positions."""
    logps = []
    for row in rows:
        for response in row.responses:
            ids = torch.tensor([[*row.prompt, *response]])
            table = policy.base(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
            logps.append(table[torch.arange(len(response)), torch.tensor(response)].sum())
    return torch.stack(logps)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_layouts_agree_with_the_model_itself(name: str) -> None:
    policy, rows = make_policy(CONFIGS[name], ["q_proj", "v_proj"]), random_rows()
    expected, expected_gradients = logps_and_gradients(policy, one_at_a_time(policy, rows))
    assert expected.std() > 5  # the cases differ
    for layout in LAYOUTS:
        policy.base.set_attn_implementation(attention.NAME if layout is RowLayout.packed else "sdpa")
        batch = collate(rows, layout=layout, pad_token_id=0)
        logps, gradients = logps_and_gradients(policy, policy(batch))
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
        for factor, gradient in gradients.items():
            error = (gradient - expected_gradients[factor]).abs().max() / expected_gradients[factor].abs().max()
            assert expected_gradients[factor].abs().max() > 1e-3, factor
            assert error < 1e-5, f"{factor}: {error:.1e}"


def test_responses_do_not_see_each_other() -> None:
    """Changing one response leaves the log-probability of the other as it was, under either order."""
    policy = make_policy(CONFIGS["qwen2"], ["q_proj", "v_proj"])

    def scores(first: list[int], second: list[int]) -> list[float]:
        batch: Batch = collate([Row([5, 6, 7], [first, second])], layout=RowLayout.shared, pad_token_id=0)
        with torch.no_grad():
            return policy(batch).tolist()

    first, second, other = [8, 9, 10], [11, 12], [30, 31, 32, 33]
    assert scores(first, second)[0] == pytest.approx(scores(first, other)[0], abs=1e-4)
    assert scores(first, second)[1] == pytest.approx(scores(other, second)[1], abs=1e-4)
    assert scores(first, second)[1] != pytest.approx(scores(first, other)[1], abs=1e-1)


def test_padding_takes_no_position_beyond_the_model() -> None:
    """GPT-2 has a table of positions. Sequences of 6 fit in 6, though a shared line of 9 beside one of 3 is longer."""
    config = GPT2Config(vocab_size=61, bos_token_id=0, eos_token_id=0, n_embd=32, n_layer=1, n_head=4, n_positions=6)
    policy = make_policy(config, ["c_attn"])
    rows = [Row([1, 2, 3], [[4, 5, 6], [7, 8, 9]]), Row([1], [[2], [3]])]
    expected = one_at_a_time(policy, rows)
    for layout in (RowLayout.concatenated, RowLayout.shared):
        logps = policy(collate(rows, layout=layout, pad_token_id=0))
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
