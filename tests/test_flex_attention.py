"""FlexAttention over packed rows, in its dense form on the CPU; the compiled kernel only where there is a card.

torch has no backward pass of FlexAttention for CPU tensors and says so by a check at its door. Behind the door is the same
dense forward and backward that the compiler starts from on a card, so the tests that need gradients take the check away.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AutoConfig, AutoModelForCausalLM

from lifealign.data.batch import Batch, Row, RowLayout, collate
from lifealign.models import flex

CPU = torch.device("cpu")
SPANS = {
    1: ((1,),),
    2: ((1, 1),),
    17: ((1, 1, 1), (5, 6, 3)),
    127: ((1, 60, 1), (65,)),
    128: ((60, 1, 3), (1, 1, 62)),
    129: ((127, 1, 1),),
    401: ((1, 150, 90), (130, 1, 29)),
    1500: ((500, 300, 150), (256,), (1, 292, 1)),
}

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def dense_mask(spans: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """(tokens, tokens) bool, piece by piece."""
    mask = torch.zeros(2 * (sum(map(sum, spans)),), dtype=torch.bool)
    start = 0
    for prompt, *responses in spans:
        pieces = [(start, start + prompt)]
        for length in responses:
            pieces.append((pieces[-1][1], pieces[-1][1] + length))
        for a, b in pieces:
            mask[a:b, start : start + prompt] = True
            mask[a:b, a:b] = True
        start = pieces[-1][1]
    return mask.tril()


def attention(spans: tuple[tuple[int, ...], ...], *qkv: torch.Tensor, **options: object) -> torch.Tensor:
    return flex.flex_packed_attention(torch.nn.Module(), *qkv, flex.block_mask(spans, qkv[0].device), **options)[0]


def qkv_of(total: int, *, heads: int = 3, key_heads: int = 3, width: int = 4, **options: object) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(1, number, total, width) for number in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(**options).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("total", SPANS)
def test_the_mask_is_the_dense_one_and_no_block_too_many_is_visited(total: int) -> None:
    mask, dense = flex.block_mask(SPANS[total], CPU), dense_mask(SPANS[total])
    assert mask.shape == (1, 1, total, total) == (1, 1, *dense.shape)
    torch.testing.assert_close(create_mask(mask.mask_mod, 1, 1, total, total, device="cpu")[0, 0], dense)
    same_tables(mask, lambda batch, head, query, key: dense[query, key])


def test_blocks_of_random_spans_are_those_that_torch_finds() -> None:
    draw = random.Random(0)
    for longest in (3, 40, 200, 200, 400, 400, 600):
        spans = tuple(tuple(draw.randint(1, longest) for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(1, 4)))
        mask = flex.block_mask(spans, CPU)
        same_tables(mask, mask.mask_mod)


def same_tables(mask: flex.BlockMask, mask_mod: object) -> None:
    """Which blocks are visited, from either side, and which of them whole."""
    expected = create_block_mask(mask_mod, 1, 1, *mask.shape[2:], device="cpu")
    for side in ("kv", "q", "full_kv", "full_q"):
        for part in ("num_blocks", "indices"):
            got = getattr(mask, f"{side}_{part}")
            torch.testing.assert_close(got, getattr(expected, f"{side}_{part}"), msg=f"{side}_{part}")


@pytest.mark.usefixtures("with_gradients")
@pytest.mark.parametrize("key_heads", [3, 1])
@pytest.mark.parametrize("total", [1, 17, 128, 401])
def test_output_and_gradients_are_those_of_the_dense_softmax(total: int, key_heads: int) -> None:
    inputs = qkv_of(total, key_heads=key_heads, dtype=torch.float64)
    query, key, value = (x if x.shape[1] == 3 else x.expand(1, 3, -1, -1) for x in inputs)
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~dense_mask(SPANS[total]), float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    got = attention(SPANS[total], *inputs, scaling=0.3)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(got, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def tiny(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def logps(model: torch.nn.Module, batch: Batch, **inputs: torch.Tensor | flex.BlockMask) -> torch.Tensor:
    """(sequences,) float64."""
    logits = model(batch.input_ids, use_cache=False, **inputs).logits.flatten(0, 1)[batch.predictors]
    tokens = logits.log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
    return tokens.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, tokens)


@pytest.mark.usefixtures("with_gradients")
@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "gemma"])
def test_a_model_gives_what_it_gives_for_rows_apart(kind: str) -> None:
    """Mistral comes with a window of 4096 tokens, longer than the rows, which has to be harmless."""
    model, draw = tiny(kind), random.Random(0)
    tokens = lambda number: [draw.randrange(83) for _ in range(number)]  # noqa: E731
    rows = [Row(tokens(p), [tokens(a), tokens(b)]) for p, a, b in ((40, 13, 22), (1, 1, 30), (29, 16, 1))]
    results = []
    for layout in (RowLayout.concatenated, RowLayout.packed):
        batch, inputs = collate(rows, layout=layout, pad_token_id=0), {}
        if layout is RowLayout.packed:
            assert batch.input_ids.shape[1] > flex.BLOCK
            model.set_attn_implementation(flex.NAME)
            inputs = {"position_ids": batch.position_ids, "attention_mask": flex.block_mask(batch.spans, CPU)}
        got = logps(model, batch, **inputs)
        gradients = torch.autograd.grad((got * torch.linspace(-1, 2, 6)).sum(), list(model.parameters()))
        results.append((got, *gradients))
    for apart, packed in zip(*results, strict=True):
        assert (packed - apart).norm() < 1e-6 * apart.norm()  # transformers takes norms and rotations in float32


def test_without_a_block_mask_it_is_sdpa_attention() -> None:
    model, ids = tiny("llama").eval(), torch.arange(24).view(2, 12)
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    outputs = {}
    for name in ("sdpa", flex.NAME):
        model.set_attn_implementation(name)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        outputs[name] = model.generate(ids, attention_mask=padding, **options)
    assert outputs["sdpa"].tolist() == outputs[flex.NAME].tolist()


def test_what_the_kernel_is_not_used_for_is_refused() -> None:
    inputs = [x.detach() for x in qkv_of(17)]
    with pytest.raises(NotImplementedError, match="no dropout; set attention_dropout to 0"):
        attention(SPANS[17], *inputs, dropout=0.1)
    with pytest.raises(NotImplementedError, match="soft cap of attention scores"):
        attention(SPANS[17], *inputs, softcap=30.0)


def test_one_batch_makes_one_mask() -> None:
    assert flex.block_mask(((3, 4, 5),), CPU) is flex.block_mask(((3, 4, 5),), CPU)


@pytest.mark.usefixtures("with_gradients")
def test_a_new_length_is_not_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler's front half makes of it is the same on every device; its back half is stood in for by eager torch."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        flex, "flex_attention", torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    )
    counts = []
    for spans in (SPANS[401], SPANS[129], SPANS[1500], ((300, 1, 2), (7, 8)), SPANS[17], SPANS[127], SPANS[128], SPANS[401]):
        inputs = qkv_of(sum(map(sum, spans)), heads=6, key_heads=3, width=16)
        attention(spans, *inputs, scaling=0.3).sum().backward()
        assert all(x.grad is not None for x in inputs)
        counts.append(counter.frame_count)
    first, *others = counts
    # One more for lines of a single block, whose tables have dimensions of 1.
    assert others == [first] * 3 + [first + 1] * 4


@pytest.mark.usefixtures("with_gradients")
def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"heads": 4, "key_heads": 2, "width": 8, "device": CPU}
    assert flex.kernel_error(**sizes, dtype=torch.float32) < 1e-5
    assert flex.kernel_error(**sizes, dtype=torch.bfloat16) < 3e-2
    right = flex.flex_attention
    doubled = lambda q, k, v, **options: right(q, 2 * k - k.detach(), v, **options)  # noqa: E731
    monkeypatch.setattr(flex, "flex_attention", doubled)
    assert flex.kernel_error(**sizes, dtype=torch.float32) == pytest.approx(1, abs=1e-5)
    monkeypatch.setattr(flex, "flex_attention", lambda q, k, v, block_mask, **options: right(q, k, v, **options))
    assert flex.kernel_error(**sizes, dtype=torch.float32) > 0.1


def test_where_the_kernel_does_not_run_it_says_so() -> None:
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex.kernel_error(heads=4, key_heads=2, width=8, dtype=torch.float32, device=CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card; never run on one so far")
def test_the_compiled_kernel_on_a_card() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    device, graphs = torch.device("cuda"), []
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        assert flex.kernel_error(heads=6, key_heads=3, width=64, dtype=dtype, device=device) < tolerance
    for total in (401, 1500, 129, 1500, 401):
        inputs = qkv_of(total, heads=6, key_heads=3, width=64, device=device)
        expected = [x.detach().cpu().requires_grad_() for x in inputs]
        spread = [x.repeat_interleave(6 // x.shape[1], dim=1) for x in expected]
        dense = torch.nn.functional.scaled_dot_product_attention(*spread, attn_mask=dense_mask(SPANS[total])).transpose(1, 2)
        got = attention(SPANS[total], *inputs)
        torch.testing.assert_close(got.cpu(), dense, rtol=1e-3, atol=1e-3)
        weights = torch.randn_like(dense)
        ours = torch.autograd.grad(got, inputs, weights.to(device))
        for a, b in zip(ours, torch.autograd.grad(dense, expected, weights), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 5
