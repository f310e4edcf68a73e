"""The Triton kernels against formulas written out in float64: on CPU through Triton's interpreter, on a GPU if there is one.

The interpreter is chosen by a variable that must stand before anything imports triton, and deepspeed does. So the kernels
run in a process of their own, which lives as long as the session of tests: this file, run as a script.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# What the other process does


def evaluate(
    tensors: dict[str, torch.Tensor | None], softcap: float | None, trained: set[str], device: str, scratch: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities by the kernels, and the gradient of ``upstream @ logps`` in each input that is trained."""
    from lifealign.kernels import sequence_logps
    from lifealign.kernels.logratio import fused

    case = {k: v if v is None else v.to(device) for k, v in tensors.items()}
    leaves = {k: None if case[k] is None else case[k].requires_grad_(k in trained) for k in ("hidden", "weight", "bias")}
    shipped, fused.SCRATCH_BYTES = fused.SCRATCH_BYTES, scratch or fused.SCRATCH_BYTES
    rest = (case["targets"], case["sequence_ids"], len(case["upstream"]))
    logps = sequence_logps(
        leaves["hidden"], leaves["weight"], *rest, bias=leaves["bias"], softcap=softcap, impl=case.get("impl", "triton")
    )
    fused.SCRATCH_BYTES = shipped
    if trained:
        logps.backward(case["upstream"].to(logps.dtype))
    assert logps.requires_grad == bool(trained)
    assert all(x is None or (x.grad is not None) == (k in trained) for k, x in leaves.items())
    return logps.detach().cpu(), {k: leaves[k].grad.cpu() for k in trained}


def largest_and_kept(tensors: dict[str, torch.Tensor], trained: set[str], scratch: int) -> tuple[int, list[tuple[int, ...]]]:
    """Elements of the largest tensor made in forward, and the shapes that wait for backward."""
    from test_kernels_logratio import LargestTensor

    from lifealign.kernels.logratio import fused

    class LargestFloat(LargestTensor):
        """The interpreter copies arguments as bytes: those are not counted."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                self.elements = max(self.elements, result.numel())
            return result

    fused.SCRATCH_BYTES, shipped = scratch, fused.SCRATCH_BYTES
    leaves = {k: tensors[k].requires_grad_(k in trained) for k in ("hidden", "weight")}
    kept: list[tuple[int, ...]] = []
    with LargestFloat() as meter, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)), lambda x: x):
        fused.triton_sequence_logps(leaves["hidden"], leaves["weight"], tensors["targets"], tensors["sequence_ids"], 5)
    fused.SCRATCH_BYTES = shipped
    return meter.elements, kept


def focal(policy: torch.Tensor, reference: torch.Tensor, options: dict[str, Any], device: str) -> list[torch.Tensor]:
    """The four results, and the gradient of the sum of losses · (1, 2, 3, …) in ``policy``."""
    from lifealign.kernels.logratio import focal_preference_loss

    leaf = policy.to(device).requires_grad_()
    result = focal_preference_loss(leaf, reference.to(device), **options)
    result.losses.backward(torch.arange(1.0, 1 + len(policy), device=device, dtype=result.losses.dtype))
    assert not any(x.requires_grad for x in result[1:])
    return [x.detach().cpu() for x in (*result, leaf.grad)]


def compiled_for_hopper(dtype: str) -> list[tuple[str, int, bool]]:
    """(kernel, bytes of shared memory, whether it uses wgmma) of every tile choice; no GPU is needed to compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lifealign.kernels.logratio import fused, fused_loss

    half = dtype != "fp32"
    pointers = {"targets": "*i64", "sequence_ids": "*i64"}
    pointers |= dict.fromkeys(("hidden", "weight", "bias", "tile_probs", "logit_gradient", "unit", "grad_hidden"), "*" + dtype)
    pointers |= dict.fromkeys(("target_logits", "tile_lses", "lses", "logps", "token_logps", "grad_logps"), "*fp32")
    pointers |= dict.fromkeys(("policy", "reference", "losses", "weights", "margins", "gradients"), "*fp32")
    scalars = dict.fromkeys(("softcap", "beta", "gamma", "threshold"), "fp32")
    flags = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "KEEP": True, "SCALE": 1.0, "INTERPRETER": False}
    flags |= {"BLOCK": 128, "BLOCK_T": 8, "BLOCK_D": 256, "BLOCK_TILES": 64, "BLOCK_V": fused._block_v(half, 151936)}

    def one(kernel: Any, constants: dict[str, Any], warps: int = 4, stages: int = 3) -> tuple[str, int, bool]:
        chosen = {k: v for k, v in {**flags, **constants}.items() if k in kernel.arg_names}
        signature = {k: "constexpr" if k in chosen else (pointers | scalars).get(k, "i32") for k in kernel.arg_names}
        runtime = [i for i, k in enumerate(kernel.arg_names) if k not in chosen and k not in scalars and k != "tokens"]
        source = ASTSource(kernel, signature, chosen, {(i,): [["tt.divisibility", 16]] for i in runtime})
        code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
        return kernel.__name__, code.metadata.shared, "wgmma" in code.asm["ptx"]

    found = []
    for kernel, configs in (
        (fused._vocabulary_tile_kernel, fused._TILE_CONFIGS),
        (fused._unit_gradient_kernel, fused._UNIT_CONFIGS),
    ):
        found += [one(kernel, c.kwargs, c.num_warps, c.num_stages) for c in configs[half]]
        found.append(one(kernel, configs[half][-1].kwargs | dict.fromkeys(("width", "weight_stride", "unit_stride"), 1)))
    others = (fused._merge_kernel, fused._logit_gradient_kernel, fused._segment_sum_kernel, fused._scale_rows_kernel)
    return found + [one(kernel, {}) for kernel in (*others, fused_loss._focal_loss_kernel)]


def serve() -> None:
    """Calls named on stdin, answered on stdout: (result, "") or (None, traceback)."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not stand between two answers
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = globals()[name](*arguments), ""
        except Exception:
            answer = None, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
    sys.exit()


# The tests

from test_kernels_logratio import Case, Tolerance, oracle  # noqa: E402

from lifealign.kernels import sequence_logps  # noqa: E402
from lifealign.kernels.logratio import dispatch, focal_preference_loss  # noqa: E402
from lifealign.objectives import fpo_loss  # noqa: E402

# Against the float64 value of the same (already rounded) inputs; logits reach about ±10. They are never rounded, so
# log-probabilities are float32's whatever the dtype. A gradient is rounded three times: tile softmax, d logp / d logits,
# result; the trained head's, of the chunked implementation, comes from logits rounded to the dtype.
TOLERANCES = {
    torch.float32: Tolerance(3e-6, 2e-6),
    torch.bfloat16: Tolerance(3e-6, 5e-3),
    torch.float16: Tolerance(3e-6, 1e-3),
}
TENSOR_CORES = 10  # times the tolerance of log-probabilities on a GPU: its sums of products keep fewer bits
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ALL = {"hidden", "weight", "bias"}


class Child:
    """The other process: a call of one of its functions by name returns the result, or fails with its traceback."""

    def __init__(self, **environment: str) -> None:
        outer = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=outer | environment
        )

    def __call__(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        pickle.dump((name, arguments), self.process.stdin)
        self.process.stdin.flush()
        result, error = pickle.load(self.process.stdout)
        if error:
            raise RuntimeError(error)
        return result

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def child(**environment: str) -> Iterator[Child]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    process = Child(**environment)
    yield process
    process.close()


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Child]:
    yield from child(TRITON_INTERPRET="1")


@pytest.fixture(scope="session")
def compiled() -> Iterator[Child]:
    yield from child()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(request: pytest.FixtureRequest, device: str) -> Child:
    return request.getfixturevalue("interpreted" if device == "cpu" else "compiled")


def make_case(tokens: int, vocab: int, width: int, dtype: torch.dtype, *, bias: bool = True) -> Case:
    """Peaked predictions, sequence ids in no order, and of the five sequences the second without any token."""
    generator = torch.Generator().manual_seed(tokens + vocab)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(
        normal(tokens, width).to(dtype),
        normal(vocab, width).mul(2 / math.sqrt(width)).to(dtype),
        normal(vocab).to(dtype) if bias else None,
        torch.randint(vocab, (tokens,), generator=generator),
        torch.tensor([0, 2, 3, 4])[torch.randint(4, (tokens,), generator=generator)],
        torch.tensor([1.0, 50.0, -0.5, 0.25, 3.0]),
    )


def check(
    kernels: Child, device: str, case: Case, softcap: float | None, trained: set[str], scratch: int | None = None
) -> None:
    tolerance = TOLERANCES[case.hidden.dtype]
    expected, gradients = oracle(case, softcap)
    logps, actual = kernels("evaluate", case._asdict(), softcap, trained, device, scratch)
    assert logps.dtype == torch.float32
    counts = torch.bincount(case.sequence_ids, minlength=len(expected))
    assert logps[counts == 0].eq(0).all()
    assert ((logps.double() - expected).abs() <= tolerance.logp * (1 if device == "cpu" else TENSOR_CORES) * counts).all()
    for name in trained:
        assert actual[name].dtype == case.hidden.dtype
        error = (actual[name].double() - gradients[name]).norm() / gradients[name].norm()
        assert error < tolerance.gradient, f"{name}: {error:.2e}"


def shapes() -> Iterator[Any]:
    """Every number of tokens with every vocabulary, in both dtypes, with and without soft cap; the quick ones not slow.

    Widths: a multiple of 32, of 8 alone, of 4 alone. Interpreted tiles are 128 tokens × 32 words (1,024 above a vocabulary
    of 4,096) × 32 numbers: 8,192 is a multiple of the tile, 47 and 32,003 are none, and 401 and 1,271 take several.
    """
    for tokens, width in ((1, 64), (17, 100), (401, 24), (1271, 24)):
        for vocab in (47, 8192, 32003):
            for dtype in (torch.float32, torch.bfloat16):
                for softcap in (None, 4.0):
                    either = (dtype == torch.float32) == (softcap is not None)
                    quick = tokens * vocab < 20_000 or (tokens * vocab < 600_000 and either)
                    yield pytest.param(tokens, vocab, width, dtype, softcap, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("tokens", "vocab", "width", "dtype", "softcap"), list(shapes()))
def test_values_and_every_gradient(
    kernels: Child, device: str, tokens: int, vocab: int, width: int, dtype: torch.dtype, softcap: float | None
) -> None:
    check(kernels, device, make_case(tokens, vocab, width, dtype), softcap, ALL)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_float16(kernels: Child, device: str, softcap: float | None) -> None:
    check(kernels, device, make_case(140, 4200, 24, torch.float16), softcap, ALL)


@pytest.mark.parametrize("trained", [{"hidden"}, {"weight"}, {"bias"}, {"hidden", "weight"}, {"hidden", "bias"}, set()])
def test_frozen_parts(kernels: Child, device: str, trained: set[str]) -> None:
    check(kernels, device, make_case(33, 61, 24, torch.float32), None, trained)
    if "bias" not in trained:
        check(kernels, device, make_case(33, 61, 24, torch.float32, bias=False), None, trained)


@pytest.mark.parametrize("trained", [{"hidden"}, ALL])
def test_several_chunks_of_tokens(kernels: Child, device: str, trained: set[str]) -> None:
    """401 tokens in chunks of 128 (the smallest there is): four, the last one of 17."""
    check(kernels, device, make_case(401, 200, 24, torch.float32), None, trained, scratch=1)


def test_inputs_need_not_be_contiguous(kernels: Child, device: str) -> None:
    case = make_case(40, 47, 24, torch.float32)
    transposed = case._replace(hidden=case.hidden.T.contiguous().T, weight=case.weight.T.contiguous().T)
    strided = case._replace(
        hidden=torch.stack([case.hidden, -case.hidden], 1)[:, 0],
        targets=torch.stack([case.targets, case.targets + 1], 1)[:, 0],
        sequence_ids=torch.stack([case.sequence_ids, case.sequence_ids + 1], 1)[:, 0],
    )
    for other in (transposed, strided):
        assert not other.hidden.is_contiguous()
        check(kernels, device, other, None, {"hidden", "weight"})


def test_the_same_call_gives_the_same_bits(kernels: Child, device: str) -> None:
    case = make_case(401, 47, 24, torch.bfloat16)._asdict()
    first, gradients = kernels("evaluate", case, None, {"hidden"}, device)
    again, others = kernels("evaluate", case, None, {"hidden"}, device)
    assert torch.equal(first, again) and torch.equal(gradients["hidden"], others["hidden"])


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: list[int], ids: list[int], n: int, **more: Any
) -> dict[str, Any]:
    indices = {"targets": torch.tensor(targets, dtype=torch.int64), "sequence_ids": torch.tensor(ids, dtype=torch.int64)}
    return {"hidden": hidden, "weight": weight, "bias": None, **indices, "upstream": torch.ones(n), **more}


def test_no_tokens_at_all(kernels: Child, device: str) -> None:
    logps, gradients = kernels("evaluate", plain(torch.zeros(0, 4), torch.ones(7, 4), [], [], 2), None, {"hidden"}, device)
    assert logps.tolist() == [0.0, 0.0] and gradients["hidden"].shape == (0, 4)


def test_large_logits_stay_finite(kernels: Child, device: str) -> None:
    """Logits (0, 1000): the log-probability of the unlikely token is −1000 and of the likely one 0."""
    case = plain(torch.ones(2, 1), torch.tensor([[0.0], [1000.0]]), [0, 1], [0, 1], 2)
    logps, gradients = kernels("evaluate", case, None, {"hidden"}, device)
    assert logps.tolist() == pytest.approx([-1000.0, 0.0])
    assert gradients["hidden"].flatten().tolist() == pytest.approx([-1000.0, 0.0])


def test_forbidden_words(kernels: Child, device: str) -> None:
    """A bias of −inf on words 0 to 69, the first two tiles of 32 whole: log-probabilities are those of the other 30."""
    case = make_case(5, 100, 24, torch.float32)
    assert case.bias is not None
    case.bias[:70] = float("-inf")
    case = case._replace(targets=case.targets % 30 + 70)
    expected, gradients = oracle(case._replace(weight=case.weight[70:], bias=case.bias[70:], targets=case.targets - 70), None)
    logps, actual = kernels("evaluate", case._asdict(), None, {"hidden"}, device)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual["hidden"].double(), gradients["hidden"], rtol=1e-4, atol=1e-5)


def test_a_confident_token_keeps_its_gradient(kernels: Child, device: str) -> None:
    """bfloat16, logits (8, 0): 1 − p = 1/(1 + e⁸) = 3.4e-4, where p itself rounds to 1. d logp/dh = (1 − p)(W₀ − W₁)."""
    case = plain(torch.ones(1, 1).bfloat16(), torch.tensor([[8.0], [0.0]]).bfloat16(), [0], [0], 1)
    _, gradients = kernels("evaluate", case, None, {"hidden"}, device)
    assert gradients["hidden"].item() == pytest.approx(8 / (1 + math.exp(8)), rel=5e-3)


def test_nan_is_seen(kernels: Child, device: str) -> None:
    case = make_case(40, 47, 24, torch.float32)
    case.hidden[3] = float("nan")
    logps, gradients = kernels("evaluate", case._asdict(), None, {"hidden"}, device)
    assert logps.isnan().tolist() == [s == int(case.sequence_ids[3]) for s in range(5)]
    assert gradients["hidden"].isnan().any(1).tolist() == [t == 3 for t in range(40)]


def test_logits_are_never_stored(interpreted: Child) -> None:
    """300 tokens × 8,192 words: without a gradient nothing larger than an input; with one, the tile softmaxes of a chunk.

    Backward keeps d numbers a token and the indices; a trained head also its inputs.
    """
    tensors = make_case(300, 8192, 8, torch.float32)._asdict()
    weight, hidden = 8192 * 8, 300 * 8
    largest, kept = interpreted("largest_and_kept", tensors, set(), 1)
    assert largest <= max(weight, hidden) and kept == []
    largest, kept = interpreted("largest_and_kept", tensors, {"hidden"}, 1)
    assert largest == 128 * 8192
    assert kept == [(300, 8), (300,), (300,)]
    _, kept = interpreted("largest_and_kept", tensors, {"hidden", "weight"}, 1)
    assert kept == [(300, 8), (300,), (300,), (300, 8), (8192, 8)]


# Dispatch


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "installed", "recent", "expected"),
    [
        (True, torch.bfloat16, True, True, True),
        (True, torch.float32, True, True, True),
        (False, torch.bfloat16, True, True, False),
        (True, torch.float64, True, True, False),
        (True, torch.bfloat16, False, True, False),
        (True, torch.bfloat16, True, False, False),
    ],
)
def test_the_device_decides_at_call_time(
    monkeypatch: pytest.MonkeyPatch, is_cuda: bool, dtype: torch.dtype, installed: bool, recent: bool, expected: bool
) -> None:
    monkeypatch.setattr(dispatch, "triton_installed", lambda: installed)
    monkeypatch.setattr(dispatch, "_compiles_for", lambda device: recent)
    tensor: Any = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="cuda:0")
    assert dispatch.choose_triton(tensor, None) is expected
    assert not dispatch.choose_triton(tensor, "chunked")


def test_the_package_needs_no_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from lifealign.kernels.logratio import focal_preference_loss, sequence_logps
ids = torch.zeros(1, dtype=torch.int64)
print(sequence_logps(torch.zeros(1, 2), torch.zeros(4, 2), ids, ids, 1).item())
for call in (lambda: sequence_logps(torch.zeros(1, 2), torch.zeros(4, 2), ids, ids, 1, impl="triton"),
             lambda: focal_preference_loss(torch.zeros(1, 2), torch.zeros(1, 2), impl="triton")):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    value, *errors = result.stdout.splitlines()
    assert float(value) == pytest.approx(-math.log(4))
    assert len(errors) == 2 and all("pip install triton" in error for error in errors)


def test_cpu_tensors_need_the_interpreter(compiled: Child) -> None:
    case = make_case(3, 47, 24, torch.float32)._asdict()
    with pytest.raises(RuntimeError, match=r"ValueError: impl='triton' runs on CUDA devices.*TRITON_INTERPRET=1"):
        compiled("evaluate", case, None, {"hidden"}, "cpu")
    with pytest.raises(RuntimeError, match=r"ValueError: impl='triton' runs on CUDA devices.*TRITON_INTERPRET=1"):
        compiled("focal", torch.zeros(1, 2), torch.zeros(1, 2), {"impl": "triton"}, "cpu")


def test_dtypes_that_do_not_fit(interpreted: Child) -> None:
    case = make_case(3, 47, 24, torch.float64)
    with pytest.raises(RuntimeError, match=r"ValueError: .*float64 and torch.float64; use impl='chunked'"):
        interpreted("evaluate", case._asdict(), None, {"hidden"}, "cpu")
    with pytest.raises(RuntimeError, match=r"ValueError: .*got torch.bfloat16 and torch.float64"):
        interpreted("evaluate", case._replace(hidden=case.hidden.bfloat16())._asdict(), None, {"hidden"}, "cpu")
    with pytest.raises(RuntimeError, match=r"ValueError: .*float32, got torch.float64"):
        interpreted("focal", torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), {"impl": "triton"}, "cpu")


def test_an_unknown_implementation_is_named() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'fast'.*reference, chunked, triton"):
        sequence_logps(torch.zeros(1, 2), torch.zeros(3, 2), ids, ids, 1, impl="fast")
    with pytest.raises(ValueError, match=r"'fast'.*reference, triton"):
        focal_preference_loss(torch.zeros(1, 2), torch.zeros(1, 2), impl="fast")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_kernel_compiles_for_hopper(compiled: Child, dtype: str) -> None:
    """sm_90: within its 227 KiB of shared memory, and by wgmma where the tile has the 64 rows of that instruction."""
    found = compiled("compiled_for_hopper", dtype)
    assert len(found) > 10
    assert all(shared <= 227 * 1024 for _, shared, _ in found)
    if dtype != "fp32":
        assert {name for name, _, wgmma in found if wgmma} == {"_vocabulary_tile_kernel", "_unit_gradient_kernel"}


# The loss of a pair

MARGINS = [0.0, 0.3, -0.3, 1.0986, -2.5, 7.0, -7.0, 15.0, 25.0, 60.0, -60.0, 500.0, -500.0]
OPTIONS = [
    {"beta": beta, "gamma": gamma, "confidence_threshold": threshold}
    for beta in (0.1, 1.0)
    for gamma in (0.0, 0.5, 2.0)
    for threshold in (1.0, 0.7)
]


def pairs(beta: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 2) policy and reference with margins r of MARGINS, spread over both responses."""
    r = torch.tensor(MARGINS, dtype=torch.float64) / beta
    reference = torch.tensor([[-3.0, -5.0]]).expand(len(r), 2).double()
    return (reference + torch.stack([0.75 * r, -0.25 * r], 1)).to(dtype), reference.to(dtype)


def from_objective(policy: torch.Tensor, reference: torch.Tensor, options: dict[str, float]) -> list[torch.Tensor]:
    """What :func:`focal` returns, of lifealign.objectives.fpo_loss and its autograd."""
    leaf = policy.clone().requires_grad_()
    result = fpo_loss(*leaf.unbind(1), *reference.unbind(1), **options)
    (gradients,) = torch.autograd.grad(result.losses.sum(), leaf, retain_graph=True)
    result.losses.backward(torch.arange(1.0, 1 + len(policy), dtype=result.losses.dtype))
    assert leaf.grad is not None
    found = (result.losses, result.weights, result.chosen_rewards - result.rejected_rewards, gradients, leaf.grad)
    return [x.detach() for x in found]


def assert_all_close(actual: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_torch_loss_is_the_objective(options: dict[str, float], dtype: torch.dtype) -> None:
    policy, reference = pairs(options["beta"], dtype)
    expected = from_objective(policy, reference, options)
    actual = focal(policy, reference, options, "cpu")
    tight = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 4e-6, "atol": 1e-37}
    assert_all_close(actual[:3], expected[:3], **tight)
    half = dtype == torch.bfloat16  # there the objective's gradients are rounded to it, those of the result are not
    assert_all_close([x.to(dtype) for x in actual[3:]], expected[3:], **({"rtol": 1e-2, "atol": 1e-37} if half else tight))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_triton_loss_is_the_objective(kernels: Child, device: str, options: dict[str, float]) -> None:
    policy, reference = pairs(options["beta"])
    actual = kernels("focal", policy, reference, options | {"impl": "triton"}, device)
    assert_all_close(actual, from_objective(policy, reference, options), rtol=1e-5, atol=1e-36)
    assert all(x.isfinite().all() for x in actual)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nan_and_infinite_pairs(kernels: Child, device: str, impl: str) -> None:
    """NaN is not gated, at τ < 1 either, and stays in its pair; a policy of −inf on the chosen response is an infinite loss."""
    nan, inf = float("nan"), float("inf")
    policy = torch.tensor([[nan, 0.0], [0.0, nan], [1.0, 0.0], [-inf, 0.0]])
    options = {"confidence_threshold": 0.7, "impl": impl}
    losses, weights, margins, gradients, _ = kernels("focal", policy, torch.zeros(4, 2), options, device)
    for x in (losses, weights, margins, gradients[:, 0]):
        assert x.isnan().tolist()[:3] == [True, True, False]
    assert losses[3] == inf


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_pair_beyond_doubt_at_gamma_zero(kernels: Child, device: str, impl: str) -> None:
    """r is infinite: DPO's loss is −log 1 with weight 1, and nothing pulls."""
    policy = torch.tensor([[0.0, -float("inf")]])
    losses, weights, _, gradients, _ = kernels("focal", policy, torch.zeros(1, 2), {"gamma": 0.0, "impl": impl}, device)
    assert (losses.item(), weights.item(), gradients.abs().max().item()) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_many_pairs_in_one_call(kernels: Child, device: str, impl: str) -> None:
    """301 pairs, three blocks of the kernel; inputs that are not contiguous; and no pairs at all."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 2, 301, generator=generator).mul(20).transpose(1, 2).unbind(0)
    assert not policy.is_contiguous()
    actual = kernels("focal", policy, reference, {"impl": impl}, device)
    assert_all_close(actual, from_objective(policy, reference, {}), rtol=1e-5, atol=1e-7)
    empty = kernels("focal", torch.zeros(0, 2), torch.zeros(0, 2), {"impl": impl}, device)
    assert [x.shape[0] for x in empty] == [0] * 5


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator).mul(3)
    run = lambda p: focal_preference_loss(p, reference, beta=0.7, gamma=1.5).losses  # noqa: E731
    assert torch.autograd.gradcheck(run, policy.requires_grad_())


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3, 2), (2, 2)), ((3, 3), (3, 3))], ids=str)
def test_shapes_that_do_not_agree(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=re.escape(str(shapes[0]))):
        focal_preference_loss(*(torch.zeros(shape) for shape in shapes))
