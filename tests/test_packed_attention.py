"""Attention over packed rows, piece by piece, held against a dense softmax in float64 that is written out here."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lifealign.models import attention
from lifealign.models.attention import Packing, _PackedAttention, packed_attention

HEADS, WIDTH, SCALE = 4, 8, 0.4

SPANS = {
    "one token each": ((1, 1),),
    "short rows": ((1, 1, 1), (5, 6, 3), (2, 9)),
    "long prompt": ((211, 19, 40),),
    "response of one token": ((300, 90, 1), (1, 30)),
    "long responses": ((20, 150, 150), (129, 1, 128)),
    "three responses": ((1, 2, 3, 1), (130, 5, 1, 33), (7, 1, 1, 1)),
    "one piece exactly": ((100, 28), (127, 1), (128, 1)),
}

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""Relative error of a whole tensor. What comes out as bfloat16 is rounded once, by at most 2^-8."""

Spans = tuple[tuple[int, ...], ...]


def dense_mask(spans: Spans) -> torch.Tensor:
    """(tokens, tokens) bool, True where a query sees a key."""
    labels = [(row, part) for row, span in enumerate(spans) for part, length in enumerate(span) for _ in range(length)]
    row, part = torch.tensor(labels).T
    same_row, same_part = (x[:, None] == x for x in (row, part))
    return (same_row & (same_part | (part == 0))).tril()


def predicting(spans: Spans) -> torch.Tensor:
    """(tokens,) bool: the last token of each prompt and all tokens of responses."""
    return torch.tensor([token >= span[0] - 1 for span in spans for token in range(sum(span))])


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(1, heads, tokens, width)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.mT * SCALE).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def qkv(tokens: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key, value as a model makes them: heads are a transposed view."""
    generator = torch.Generator().manual_seed(tokens)
    draw = lambda heads: torch.randn(1, tokens, heads, WIDTH, generator=generator, dtype=torch.float64)  # noqa: E731
    return [draw(heads).to(dtype).transpose(1, 2).requires_grad_() for heads in (HEADS, key_heads, key_heads)]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (got.double() - expected).norm() <= tolerance * expected.norm()


def random_spans(seed: int) -> Spans:
    draw = random.Random(seed)
    longest = draw.choice((3, 60, 300))
    return tuple(tuple(draw.randint(1, longest) for _ in range(draw.randint(2, 4))) for _ in range(draw.randint(1, 3)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_heads", [1, 2, HEADS])
@pytest.mark.parametrize("name", SPANS)
def test_output_and_gradients_are_those_of_the_dense_softmax(name: str, key_heads: int, dtype: torch.dtype) -> None:
    spans, mask = SPANS[name], dense_mask(SPANS[name])
    inputs = qkv(len(mask), key_heads, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = _PackedAttention.apply(*inputs, Packing(spans).everywhere, SCALE), dense(*exact, mask)
    assert got.dtype == dtype
    close(got, expected, TOLERANCE[dtype])
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradients = torch.autograd.grad(got, inputs, weights)
    for a, b in zip(gradients, torch.autograd.grad(expected, exact, weights.double()), strict=True):
        assert a.dtype == dtype
        close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("name", SPANS)
def test_positions_that_predict_nothing_are_left_out(name: str) -> None:
    spans, mask, wanted = SPANS[name], dense_mask(SPANS[name]), predicting(SPANS[name])
    inputs = qkv(len(mask), 2)
    got, expected = _PackedAttention.apply(*inputs, Packing(spans).predicting, SCALE), dense(*inputs, mask)
    close(got[:, :, wanted], expected[:, :, wanted], 1e-12)
    assert not got[:, :, ~wanted].any()
    weights = torch.randn_like(expected[:, :, wanted])
    gradients = torch.autograd.grad(got[:, :, wanted], inputs, weights)
    for a, b in zip(gradients, torch.autograd.grad(expected[:, :, wanted], inputs, weights), strict=True):
        close(a, b, 1e-12)
    assert not gradients[0][:, :, ~wanted].any()


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_random_rows_cover_what_is_seen_and_no_query_twice(seed: int) -> None:
    spans = random_spans(seed)
    mask, row_of = dense_mask(spans), torch.arange(len(spans)).repeat_interleave(torch.tensor([sum(s) for s in spans]))
    packing, everywhere = Packing(spans), torch.ones(len(mask), dtype=torch.bool)
    for plan, wanted in ((packing.everywhere, everywhere), (packing.predicting, predicting(spans))):
        assert plan.order[plan.place].equal(torch.arange(len(mask)))
        positions = everywhere.nonzero()[:, 0] if plan.positions is None else plan.positions
        assert positions.equal(wanted.nonzero()[:, 0])
        numbers = [piece.queries for piece in plan.pieces]
        assert 0 < min(numbers) <= max(numbers) <= attention.QUERIES
        computed, seen = torch.zeros_like(mask), torch.zeros_like(mask)
        for piece, queries in zip(plan.pieces, positions.split(numbers), strict=True):
            keys = plan.order[piece.start : piece.start + piece.keys]
            assert row_of[keys].eq(row_of[queries[0]]).all()
            computed[queries[:, None], keys] = True
            scores = torch.zeros(1, piece.queries, 1), torch.zeros(1, len(mask), 1)
            seen[queries[:, None], keys] = attention._probabilities(*scores, piece)[0] > 0
        assert seen.equal(mask & wanted[:, None])
        # Of pairs nothing is computed but what is seen, and in each piece what its own later tokens hide.
        pair = torch.tensor([len(spans[row]) <= 3 for row in row_of])
        assert (computed & ~seen)[pair].sum() <= sum(n * (n - 1) // 2 for n in numbers)


@pytest.mark.parametrize("which", ["everywhere", "predicting"])
def test_probabilities_made_again_in_backward_give_the_same_numbers(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = SPANS["long prompt"] + SPANS["three responses"] + SPANS["long responses"]
    inputs = qkv(sum(map(sum, spans)), 2, torch.float32)
    plan, weights, results = getattr(Packing(spans), which), torch.randn_like(inputs[0]), []
    scores = HEADS * sum(piece.queries * piece.keys for piece in plan.pieces)
    for most, are_kept in ((scores, True), (scores - 1, False), (0, False)):
        monkeypatch.setattr(attention, "KEPT_SCORES", most)
        output = _PackedAttention.apply(*inputs, plan, SCALE)
        assert [saved is not None for saved in output.grad_fn.saved_tensors[3:]] == [are_kept] * len(plan.pieces)
        results.append((output, *torch.autograd.grad(output, inputs, weights)))
    for kept, *again in zip(*results, strict=True):
        assert all(kept.equal(other) for other in again)


def test_a_second_backward_through_the_same_graph_gives_the_same() -> None:
    """What is kept for it is not overwritten by the first."""
    spans = SPANS["long prompt"]
    inputs = qkv(sum(map(sum, spans)), 2)
    output = _PackedAttention.apply(*inputs, Packing(spans).everywhere, SCALE)
    weights = torch.randn_like(output)
    first = torch.autograd.grad(output, inputs, weights, retain_graph=True)
    assert all(a.equal(b) for a, b in zip(first, torch.autograd.grad(output, inputs, weights), strict=True))


@pytest.mark.parametrize("scaling", [SCALE, None])
@pytest.mark.parametrize("layer", [0, 1])
def test_only_the_last_layer_leaves_positions_out(layer: int, scaling: float | None) -> None:
    spans = ((6, 2, 3), (1, 4))
    inputs, wanted = qkv(16, 2), predicting(spans)
    module = SimpleNamespace(layer_idx=layer, config=SimpleNamespace(num_hidden_layers=2))
    got, weights = packed_attention(module, *inputs, None, scaling=scaling, packing=Packing(spans))
    factor = 1 if scaling else WIDTH**-0.5 / SCALE
    expected = dense(inputs[0] * factor, *inputs[1:], dense_mask(spans)).transpose(1, 2)
    assert weights is None
    assert got.shape == (1, 16, HEADS, WIDTH)
    if layer == 1:
        assert not got[:, ~wanted].any()
        got, expected = got[:, wanted], expected[:, wanted]
    close(got, expected, 1e-12)


@pytest.mark.parametrize("hidden", [None, 0, 3])
def test_without_packing_it_is_sdpa_attention(hidden: int | None) -> None:
    """Causal, or with a mask that hides the start of the line as padding does."""
    module, mask = torch.nn.Module(), None
    module.num_key_value_groups, module.is_causal = 2, True
    if hidden is not None:
        mask = torch.ones(12, 12, dtype=torch.bool).tril()
        mask[hidden:, :hidden] = False
        mask = mask[None, None]
    inputs = qkv(12, 2)
    got, expected = (f(module, *inputs, mask, scaling=SCALE) for f in (packed_attention, sdpa_attention_forward))
    assert got[0].equal(expected[0])
    assert got[1] is expected[1] is None


def test_generation_is_that_of_sdpa_attention() -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=2)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(24).view(2, 12)
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    outputs = []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        outputs.append(model.generate(ids, attention_mask=padding, **options).tolist())
    assert outputs[0] == outputs[1]
