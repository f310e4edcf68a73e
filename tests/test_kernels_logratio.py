"""Both implementations of ``sequence_logps`` against formulas written out in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lifealign.kernels import product, sequence_logps
from lifealign.kernels.logratio import IMPLEMENTATIONS, chunked

WIDTH = 48


class Tolerance(NamedTuple):
    """Against the float64 value of the same (already rounded) inputs."""

    logp: float  # nats a token
    gradient: float  # norm of the error over the norm of the gradient


# Logits reach about ±10. bfloat16 holds 8 bits: a logit of 8 is known to ±0.016, each factor of a gradient to 0.002.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 5e-6),
    torch.bfloat16: Tolerance(1e-2, 6e-3),
}


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    sequence_ids: torch.Tensor
    upstream: torch.Tensor  # gradient of the loss with respect to each sequence's log-probability


def make_case(tokens: int, vocab: int, dtype: torch.dtype, *, bias: bool = True) -> Case:
    """Peaked predictions, sequence ids in no order, and of the five sequences the second without any token."""
    generator = torch.Generator().manual_seed(tokens + vocab)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(
        normal(tokens, WIDTH).to(dtype),
        normal(vocab, WIDTH).mul(2 / math.sqrt(WIDTH)).to(dtype),
        normal(vocab).to(dtype) if bias else None,
        torch.randint(vocab, (tokens,), generator=generator),
        torch.tensor([0, 2, 3, 4])[torch.randint(4, (tokens,), generator=generator)],
        torch.tensor([1.0, 50.0, -0.5, 0.25, 3.0]),
    )


def oracle(case: Case, softcap: float | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """logp_t = z_y − log Σ e^z; dlogp_t/dz = (1[y] − softmax z)·slope, slope = 1 − tanh² of the cap. No autograd."""
    hidden, weight = case.hidden.double(), case.weight.double()
    z = torch.einsum("td,vd->tv", hidden, weight)
    if case.bias is not None:
        z = z + case.bias.double()
    slope = torch.ones(())
    if softcap is not None:
        slope = 1 - torch.tanh(z / softcap).square()
        z = softcap * torch.tanh(z / softcap)
    rows = torch.arange(len(z))
    top = z.amax(1, keepdim=True)
    lse = top + (z - top).exp().sum(1, keepdim=True).log()
    token_logps = z[rows, case.targets] - lse[:, 0]
    logps = torch.stack([token_logps[case.sequence_ids == s].sum() for s in range(len(case.upstream))])
    dz = -(z - lse).exp()
    dz[rows, case.targets] += 1
    dz *= slope * case.upstream.double()[case.sequence_ids][:, None]
    return logps, {"hidden": dz @ weight, "weight": dz.T @ hidden, "bias": dz.sum(0)}


def run(case: Case, impl: str, softcap: float | None, trained: set[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs: dict[str, Any] = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {k: v.detach().requires_grad_(k in trained) if v is not None else None for k, v in inputs.items()}
    logps = sequence_logps(
        leaves["hidden"],
        leaves["weight"],
        case.targets,
        case.sequence_ids,
        len(case.upstream),
        bias=leaves["bias"],
        softcap=softcap,
        impl=impl,
    )
    logps.backward(case.upstream.to(logps.dtype))
    for name, leaf in leaves.items():
        assert leaf is None or (leaf.grad is not None) == (name in trained), name
    return logps.detach(), {k: leaves[k].grad for k in trained}


def check(case: Case, impl: str, softcap: float | None, trained: set[str]) -> None:
    tolerance = TOLERANCES[case.hidden.dtype]
    expected, gradients = oracle(case, softcap)
    logps, actual = run(case, impl, softcap, trained)
    assert logps.dtype == (torch.float64 if case.hidden.dtype == torch.float64 else torch.float32)
    counts = torch.bincount(case.sequence_ids, minlength=len(expected))
    assert logps[counts == 0].eq(0).all()
    assert ((logps.double() - expected).abs() <= tolerance.logp * counts).all()
    for name in trained:
        assert actual[name].dtype == case.hidden.dtype
        assert gradients[name].norm() > 0.01
        error = (actual[name].double() - gradients[name]).norm() / gradients[name].norm()
        assert error < tolerance.gradient, f"{name}: {error:.2e}"


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks, the last one partial, at every size but one token: 401 tokens are 25 times 16 and one."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    yield


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 47), (17, 47), (401, 47), (1, 8192), (17, 8192), (401, 8192)])
def test_values_and_every_gradient(tokens: int, vocab: int, dtype: torch.dtype, softcap: float | None, impl: str) -> None:
    check(make_case(tokens, vocab, dtype), impl, softcap, {"hidden", "weight", "bias"})


@pytest.mark.parametrize("trained", [{"hidden"}, {"weight"}, {"bias"}, {"hidden", "weight"}, {"hidden", "bias"}])
def test_frozen_parts(trained: set[str], impl: str) -> None:
    check(make_case(33, 61, torch.float32), impl, None, trained)
    if "bias" not in trained:
        check(make_case(33, 61, torch.float32, bias=False), impl, None, trained)


def test_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1 << 23)  # as shipped: 262 rows
    check(make_case(300, 32003, torch.float32), impl, None, {"hidden"})


def test_by_hand(impl: str) -> None:
    """h = 1, W = (0, ln 3)ᵀ: logits (0, ln 3), p = (1/4, 3/4). Targets 1, 1 in sequence 0, target 0 in sequence 2.

    logp = (2·ln(3/4), 0, ln(1/4)). dlogp/dh of a token is W[y] − Σ p W: ln 3/4 for target 1, −3·ln 3/4 for target 0.
    """
    hidden = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    logps = sequence_logps(hidden, weight, torch.tensor([1, 0, 1]), torch.tensor([0, 2, 0]), 3, impl=impl)
    assert logps.tolist() == pytest.approx([2 * math.log(3 / 4), 0, math.log(1 / 4)], abs=1e-12)
    (gradient,) = torch.autograd.grad(logps @ torch.tensor([1.0, 7.0, 10.0], dtype=torch.float64), hidden)
    unit = math.log(3) / 4
    assert gradient.flatten().tolist() == pytest.approx([unit, -30 * unit, unit], abs=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap: float | None, impl: str) -> None:
    case = make_case(19, 5, torch.float64)
    inputs = tuple(t.detach()[..., :3].requires_grad_() for t in (case.hidden, case.weight))
    assert case.bias is not None
    bias = case.bias.detach().requires_grad_()

    def logps(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sequence_logps(hidden, weight, case.targets, case.sequence_ids, 5, bias=bias, softcap=softcap, impl=impl)

    assert torch.autograd.gradcheck(logps, (*inputs, bias))
    check(case, impl, softcap, {"hidden", "weight", "bias"})


def test_hidden_need_not_be_contiguous(impl: str) -> None:
    case = make_case(40, 47, torch.float32)
    check(case._replace(hidden=case.hidden.T.contiguous().T), impl, None, {"hidden", "weight"})
    strided = torch.stack([case.hidden, -case.hidden], 1)[:, 0]
    assert not strided.is_contiguous()
    check(case._replace(hidden=strided), impl, None, {"hidden", "weight"})


def test_large_logits_stay_finite(impl: str) -> None:
    """Logits (0, 1000): the log-probability of the unlikely token is −1000 and of the likely one 0."""
    weight = torch.tensor([[0.0], [1000.0]])
    hidden = torch.ones(2, 1, requires_grad=True)
    logps = sequence_logps(hidden, weight, torch.tensor([0, 1]), torch.tensor([0, 1]), 2, impl=impl)
    assert logps.tolist() == pytest.approx([-1000.0, 0.0])
    logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx([-1000.0, 0.0])


def test_a_confident_token_keeps_its_small_gradient_in_bfloat16(impl: str) -> None:
    """1 - p of the target is taken before anything is rounded: in bfloat16 a p above 0.998 is 1."""
    case = make_case(24, 64, torch.bfloat16, bias=False)
    rows = case.weight[case.targets].float()
    hidden = (rows * 12 / rows.square().sum(1, keepdim=True)).bfloat16()  # the target's logit is 12, the others' some ±4
    probabilities = (hidden.double() @ case.weight.double().T).softmax(-1)
    assert (probabilities.gather(1, case.targets[:, None]) > 0.998).double().mean() > 0.5
    leaf = hidden.clone().requires_grad_()
    sequence_logps(leaf, case.weight, case.targets, torch.arange(24), 24, impl=impl).sum().backward()
    expected = case.weight.double()[case.targets] - probabilities @ case.weight.double()
    off = (leaf.grad.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert off.max() < 0.1, "a logit of 12 is known to ±0.03, and so 1 - p to some percent"


def test_no_tokens_at_all(impl: str) -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    logps = sequence_logps(hidden, torch.ones(7, 4), none, none, 2, impl=impl)
    logps.sum().backward()
    assert logps.tolist() == [0.0, 0.0]


def test_sums_are_float32_under_bfloat16(impl: str) -> None:
    """4,001 tokens of log 1/2 each: a bfloat16 sum sticks where half its step outgrows a term, at 256."""
    ids = torch.zeros(4001, dtype=torch.int64)
    hidden, weight = torch.zeros(4001, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16)
    (logp,) = sequence_logps(hidden, weight, ids, ids, 1, impl=impl).tolist()
    assert logp == pytest.approx(-4001 * math.log(2), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", torch.zeros(3, 5)),
        ("hidden", torch.zeros(2, 4)),
        ("targets", torch.zeros(2, dtype=torch.int64)),
        ("sequence_ids", torch.zeros(3, 1, dtype=torch.int64)),
        ("bias", torch.zeros(1)),
        ("bias", torch.zeros(5)),
    ],
)
def test_shapes_that_do_not_agree(name: str, value: torch.Tensor, impl: str) -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    arguments: dict[str, Any] = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "targets": ids}
    with pytest.raises(ValueError):
        sequence_logps(**{**arguments, "sequence_ids": ids, "num_sequences": 1, "impl": impl, name: value})


def test_an_unknown_implementation_is_named() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'fast'.*chunked"):
        sequence_logps(torch.zeros(1, 2), torch.zeros(3, 2), ids, ids, 1, impl="fast")


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation has produced."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [{"hidden"}, {"hidden", "weight", "bias"}])
def test_logits_exist_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch, trained: set[str]) -> None:
    """400 tokens × 500 words, 20 rows at a time: nothing larger than a chunk or the head, in either pass."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * 500)
    case = make_case(400, 500, torch.float32)
    largest = {}
    for impl in IMPLEMENTATIONS:
        with LargestTensor() as meter:
            run(case, impl, None, trained)
        largest[impl] = meter.elements
    assert largest["reference"] >= 400 * 500  # the meter works
    assert largest["chunked"] <= max(20 * 500, 500 * WIDTH)


@pytest.mark.parametrize(("trained", "again"), [({"hidden"}, 0), ({"hidden", "weight"}, 5), ({"bias"}, 5)])
def test_a_frozen_head_recomputes_nothing(monkeypatch: pytest.MonkeyPatch, trained: set[str], again: int) -> None:
    """70 tokens, 16 rows a chunk: 5 chunks forward; backward takes logits again only where the head is trained."""
    rows = []
    original = chunked.head_logits

    def counting(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return original(hidden, *rest)

    monkeypatch.setattr(chunked, "head_logits", counting)
    run(make_case(70, 500, torch.float32), "chunked", None, trained)
    assert rows == [16, 16, 16, 16, 6] * (1 + again // 5)


def test_evaluation_keeps_nothing_for_backward() -> None:
    case = make_case(20, 47, torch.float32)
    with torch.no_grad():
        logps = sequence_logps(case.hidden, case.weight, case.targets, case.sequence_ids, 5, bias=case.bias)
    assert not logps.requires_grad
    torch.testing.assert_close(logps.double(), oracle(case, None)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 401])
@pytest.mark.parametrize("inputs", [0, 1, 48])
def test_the_product_with_a_frozen_weight(rows: int, inputs: int) -> None:
    """Operands in any layout, a strided bias among them, which oneDNN would misread."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 2 * inputs, generator=generator)[:, ::2] for n in (rows, 47))
    bias = torch.randn(94, generator=generator)[::2]
    for w in (weight, weight.contiguous(), weight.T.contiguous().T):
        for b in (None, bias, bias.contiguous()):
            expected = x.double() @ w.double().T + (0 if b is None else b.double())
            torch.testing.assert_close(product(x, w, b).double(), expected, rtol=1e-5, atol=1e-5)
