"""Shortcuts of forward and backward, each held against the same model without it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from inspect import unwrap

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lifealign.data.batch import Batch, Row, RowLayout, collate
from lifealign.errors import UserError
from lifealign.kernels import products
from lifealign.models import lean
from lifealign.models.lean import _LoraLinear, _RMSNorm, _Rotary, replace_small_operations
from lifealign.models.loading import attach_lora, enable_gradient_checkpointing
from lifealign.models.options import LoraOptions
from lifealign.models.policy import Policy, choose_layout

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
    "eos_token_id": None,
}
ARCHITECTURES = {
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen3": {},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 8},
}
ROWS = [Row(range(3, 22), [range(30, 37), range(40, 43)]), Row([21], [[40, 41, 42, 43], [2]]), Row([5] * 6, [[9], [8] * 9])]
LAYOUTS = [RowLayout.packed, RowLayout.shared, RowLayout.concatenated]


def make_base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **ARCHITECTURES[kind])).eval()
    base.requires_grad_(False)
    for parameter in base.parameters():  # biases and norms start at constants, which would hide what they do
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return base.to(dtype)


def fill_adapters(model: nn.Module) -> None:
    """B starts at 0, which would hide what the adapter does."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(kind: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    model = attach_lora(make_base(kind, dtype), LoraOptions(r=4, target_modules=["q_proj", "v_proj"], **options), seed=0)
    fill_adapters(model)
    return model.eval()


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of a whole tensor."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


class TestReplacedOperations:
    @staticmethod
    def outcome(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of two lines, and all gradients of the adapter as one vector."""
        ids = torch.randint(83, (2, 17), generator=torch.Generator().manual_seed(3))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
        gradients = torch.autograd.grad(loss, factors(model))
        assert len(gradients) == 8
        assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)
        return logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    @pytest.mark.parametrize("kind", ["qwen2", "llama"])
    def test_a_float32_model_gives_the_same(self, kind: str) -> None:
        model = adapted(kind)
        expected = self.outcome(model)
        replace_small_operations(model.get_base_model())
        for got, wanted in zip(self.outcome(model), expected, strict=True):
            assert error(got, wanted) < 2e-6

    @pytest.mark.parametrize("kind", ["qwen2", "llama"])
    def test_a_bfloat16_base_is_no_further_from_float32_than_it_was(self, kind: str) -> None:
        """Held against the same weights in float32; two ways of rounding differ by chance, hence a factor of 2."""
        model = adapted(kind, torch.bfloat16)
        plain, exact = self.outcome(model), self.outcome(copy.deepcopy(model).float())
        replace_small_operations(model.get_base_model())
        for got, before, expected in zip(self.outcome(model), plain, exact, strict=True):
            assert 0 < error(before, expected) < 0.05
            assert error(got, expected) < 2 * error(before, expected)

    def test_what_is_frozen_or_adapted_is_replaced_and_taken_back(self) -> None:
        model = adapted("qwen3")
        modeling = sys.modules[type(model.get_base_model()).__module__]
        rotate = modeling.apply_rotary_pos_emb
        before = {name: module.forward.__func__ for name, module in model.named_modules()}
        take_back = replace_small_operations(model.get_base_model())
        now = {name: module.forward.__func__ for name, module in model.named_modules()}
        changed = {
            function.__name__: [n for n in now if now[n] is function]
            for n, function in now.items()
            if before[n] is not function
        }
        ends = {name: [n.rpartition(".")[2] for n in names] for name, names in changed.items()}
        assert {name: (len(names), set(names)) for name, names in ends.items()} == {
            "_norm_forward": (9, {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}),
            "_lora_forward": (4, {"q_proj", "v_proj"}),
            "_linear_forward": (15, {"lm_head", "base_layer", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        }
        assert modeling.apply_rotary_pos_emb.__wrapped__ is rotate
        take_back()
        assert before == {name: module.forward.__func__ for name, module in model.named_modules()}
        assert modeling.apply_rotary_pos_emb is rotate

    def test_gemma_norms_are_left_alone(self) -> None:
        """They scale by 1 + weight; their networks have another activation."""
        model = adapted("gemma2")
        expected = self.outcome(model)
        replace_small_operations(model.get_base_model())
        norms = [module for name, module in model.named_modules() if name.endswith("norm")]
        assert norms
        assert all(norm.forward.__func__ is type(norm).forward for norm in norms)
        for got, wanted in zip(self.outcome(model), expected, strict=True):
            assert error(got, wanted) < 2e-6


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_norm_has_the_right_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(_RMSNorm.apply(x, weight, 0.1), expected)
    assert torch.autograd.gradcheck(lambda x: _RMSNorm.apply(x, weight, 0.1), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_zeros_and_of_large_numbers(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0] * 4, [1e15, -1e15, 2e15, 0.0]], dtype=dtype, requires_grad=True)
    output = _RMSNorm.apply(x, torch.ones(4, dtype=dtype), 1e-6)
    output.sum().backward()
    expected = torch.nn.functional.rms_norm(x.detach().double(), (4,), eps=1e-6)
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=0)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_lora_layer_has_the_right_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    x, a, b = (draw(*size).requires_grad_() for size in (shape, (2, 5), (7, 2)))
    weight, offset = draw(7, 5), draw(7) if bias else None
    apply = lambda x, a, b: _LoraLinear.apply(x, weight, offset, a, b, 0.7)  # noqa: E731
    expected = x @ (weight + 0.7 * b @ a).T + (offset if bias else 0)
    torch.testing.assert_close(apply(x, a, b), expected)
    assert torch.autograd.gradcheck(apply, (x, a, b))
    # The first layer's input needs no gradient.
    assert torch.autograd.gradcheck(lambda a, b: apply(x.detach(), a, b), (a, b))


@pytest.fixture(autouse=True)
def rotary_positions() -> Iterator[None]:
    """What is replaced there belongs to all models of an architecture."""
    modules = [import_module(f"transformers.models.{kind}.modeling_{kind}") for kind in ARCHITECTURES]
    own = [module.apply_rotary_pos_emb for module in modules]
    yield
    for module, function in zip(modules, own, strict=True):
        module.apply_rotary_pos_emb = function


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (6, 5), (0, 5), (2, 3, 5)])
def test_frozen_layer_has_the_right_gradient_and_may_be_changed_in_place(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(shape, dtype=torch.float64), nn.Linear(5, 7, bias).double().requires_grad_(False)
    apply = lambda x: lean._linear_forward(layer, x).mul_(2)  # noqa: E731
    torch.testing.assert_close(apply(x), 2 * layer(x))
    assert torch.autograd.gradcheck(apply, (x.requires_grad_(),))


def test_rotation_has_the_right_gradient() -> None:
    """With cosines and sines that differ between the halves too."""
    torch.manual_seed(0)
    x, cos, sin = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8)))
    x.requires_grad_()
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(_Rotary.apply(x, cos, sin), x * cos + torch.cat((-b, a), -1) * sin)
    assert torch.autograd.gradcheck(lambda x: _Rotary.apply(x, cos, sin), (x,))


class TestRotaryPositions:
    @staticmethod
    def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8)
        return [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) for shape in shapes]

    @pytest.mark.parametrize("kind", ["qwen2", "llama"])
    def test_another_form_of_call_is_left_to_the_model_s_own(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        modeling = import_module(f"transformers.models.{kind}.modeling_{kind}")
        own, calls = unwrap(modeling.apply_rotary_pos_emb), []
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", own)  # whatever models before this test have put there
        monkeypatch.setattr(_Rotary, "apply", lambda *inputs, own=_Rotary.apply: calls.append("own") or own(*inputs))
        lean._replace_rotary(modeling)
        replaced = modeling.apply_rotary_pos_emb
        (undo,) = lean._replace_rotary(modeling)  # a second model of the architecture
        assert modeling.apply_rotary_pos_emb is replaced
        undo()
        assert modeling.apply_rotary_pos_emb is own
        lean._replace_rotary(modeling)
        q, k, cos, sin = self.inputs()
        for arguments, applied in (((), 2), ((1,), 0)):
            calls.clear()
            for got, expected in zip(
                modeling.apply_rotary_pos_emb(q, k, cos, sin, *arguments), own(q, k, cos, sin), strict=True
            ):
                torch.testing.assert_close(got, expected)
            assert len(calls) == applied
        calls.clear()
        by_token = [x.transpose(1, 2) for x in (q, k)]
        got = modeling.apply_rotary_pos_emb(*by_token, cos, sin, unsqueeze_dim=2)
        assert all(a.equal(b) for a, b in zip(got, own(*by_token, cos, sin, unsqueeze_dim=2), strict=True))
        assert modeling.apply_rotary_pos_emb(q, k, cos.double(), sin.double())[0].dtype == torch.float64
        assert calls == []

    def test_another_rotation_is_left_alone(self) -> None:
        """Neighbours instead of halves; a rotation by minus the angle; another signature."""
        interleaved = lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)  # noqa: E731
        rotations = [
            lambda q, k, cos, sin: tuple(x * cos[:, None] + interleaved(x) * sin[:, None] for x in (q, k)),
            lambda q, k, cos, sin: tuple(_Rotary.apply(x, cos[:, None], -sin[:, None]) for x in (q, k)),
            lambda x, cos, sin: x,
        ]
        assert not any(lean._rotates_halves(rotation) for rotation in rotations)


def test_a_frozen_layer_that_is_trained_afterwards_has_a_gradient() -> None:
    base = make_base("llama")
    layer, x = base.model.layers[0].mlp.up_proj, torch.randn(2, 3, 32)
    replace_small_operations(base)
    assert layer.forward.__func__ is lean._linear_forward
    layer.weight.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum((0, 1)).expand(48, 32))


@pytest.mark.parametrize("rows", [1, products.FEWEST_ROWS - 1, products.FEWEST_ROWS, 201])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((rows, 37), (21, 37), (21,)))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    exact = x.double() @ weight.double().T
    assert error(products.product(x, weight), exact) < tolerance
    assert error(products.product(x.T.contiguous().T, weight.T.contiguous().T), exact) < tolerance
    assert error(products.product(x, weight, bias), exact + bias) < tolerance


@pytest.mark.parametrize("broken", ["_absent", "wrong"])
def test_products_without_onednn_are_torch_s(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(len(x), len(weight)) if broken == "wrong" else torch.ops.mkldnn._absent(x)

    monkeypatch.setattr(products, "_onednn", call)
    monkeypatch.setattr(products, "_has_onednn", products._has_onednn.__wrapped__)
    x, weight = torch.randn(100, 7), torch.randn(3, 7)
    assert not products._has_onednn()
    assert products.product(x, weight).equal(nn.functional.linear(x, weight))


class TestLoraLayers:
    """One layer of 6 to 10 features, as PEFT makes it, and the same with the forward replaced."""

    @pytest.fixture
    def applied(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Grows by one with each call of the replacement's own product."""
        calls = []
        own = _LoraLinear.apply
        monkeypatch.setattr(lean._LoraLinear, "apply", lambda *inputs: calls.append("own") or own(*inputs))
        return calls

    @staticmethod
    def pair(change: Callable[[PeftModel], None] = lambda model: None, **options: object) -> tuple[PeftModel, PeftModel]:
        torch.manual_seed(0)
        body = nn.Sequential()
        body.add_module("wanted", nn.Linear(6, 10))
        body.add_module("other", nn.Linear(10, 10))
        config = {"r": 2, "lora_alpha": 3, "target_modules": ["wanted"], **options}
        model = get_peft_model(body, LoraConfig(**config))
        model.add_adapter("second", LoraConfig(**{**config, "lora_alpha": 7}))
        model.add_adapter("elsewhere", LoraConfig(**{**config, "target_modules": ["other"]}))
        fill_adapters(model)
        change(model)
        replaced = copy.deepcopy(model)
        replace_small_operations(replaced)
        assert all(m.forward.__func__ is lean._lora_forward for m in replaced.modules() if type(m) is lora.Linear)
        return model, replaced

    @staticmethod
    def outcome(model: PeftModel, x: torch.Tensor) -> list[torch.Tensor]:
        """Output, then the gradient of the input, then those of the adapters in use."""
        x = x.clone().requires_grad_()
        torch.manual_seed(4)  # of dropout
        output = model(x)
        (output * torch.linspace(-1, 2, output.numel()).view(output.shape)).sum().backward()
        trained = sorted(name for name, parameter in model.named_parameters() if parameter.grad is not None)
        return [output, x.grad, *(model.get_parameter(name).grad for name in trained)]

    INPUTS = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(5))

    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
    def test_a_plain_adapter_takes_the_short_way(self, options: dict[str, object], applied: list[str]) -> None:
        model, replaced = self.pair(**options)
        got, expected = (self.outcome(m, self.INPUTS) for m in (replaced, model))
        assert len(got) == len(expected) == 4
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) < 1e-6
        assert applied == ["own"]

    @pytest.mark.parametrize(
        ("change", "options", "changed_numbers"),
        [
            pytest.param(lambda model: model.train(), {"lora_dropout": 0.5}, 4, id="dropout"),
            pytest.param(lambda model: model.eval(), {"lora_dropout": 0.5}, 4, id="dropout switched off"),
            pytest.param(lambda model: model.base_model.disable_adapter_layers(), {}, 2, id="disabled"),
            pytest.param(lambda model: model.merge_adapter(), {}, 2, id="merged"),
            pytest.param(lambda model: model.base_model.set_adapter(["default", "second"]), {}, 6, id="two"),
            pytest.param(lambda model: None, {"lora_bias": True}, 5, id="bias of B"),
            pytest.param(lambda model: None, {"use_dora": True}, 5, id="DoRA"),
        ],
    )
    def test_anything_else_is_left_to_peft(
        self, change: Callable[[PeftModel], None], options: dict[str, object], changed_numbers: int, applied: list[str]
    ) -> None:
        model, replaced = self.pair(change, **options)
        got, expected = (self.outcome(m, self.INPUTS) for m in (replaced, model))
        assert len(got) == len(expected) == changed_numbers
        assert all(a.equal(b) for a, b in zip(got, expected, strict=True))
        assert applied == []

    def test_the_active_adapter_is_looked_up_at_every_call(self, applied: list[str]) -> None:
        model, replaced = self.pair()
        outputs = []
        for name in ("default", "second", "elsewhere", "default"):
            for m in (model, replaced):
                m.set_adapter(name)
            outputs.append(replaced(self.INPUTS))
            assert error(outputs[-1], model(self.INPUTS)) < 1e-6
        assert outputs[0].equal(outputs[3])
        assert min(error(outputs[i], outputs[0]) for i in (1, 2)) > 0.01
        assert len(applied) == 4  # "elsewhere" on the other layer
        with replaced.disable_adapter(), model.disable_adapter():
            assert replaced(self.INPUTS).equal(model(self.INPUTS))
        replaced.merge_adapter()
        assert error(replaced(self.INPUTS), outputs[0]) < 1e-6
        replaced.base_model.model.wanted.unmerge()
        assert error(replaced(self.INPUTS), outputs[0]) < 1e-6
        assert len(applied) == 5

    def test_adapters_by_line_are_left_to_peft(self) -> None:
        model, replaced = self.pair(lambda model: model.eval())
        names = ["default", "second"]
        got, expected = (m.base_model.model.wanted(self.INPUTS, adapter_names=names) for m in (replaced, model))
        assert got.equal(expected)


REFUSED = {("gemma2", RowLayout.packed), ("gemma2", RowLayout.shared)}
"""Its attention has a soft cap of its own, and no SDPA."""


def chosen(kind: str, layout: RowLayout, **options: object) -> Policy:
    """A policy under a layout, or a skipped test where the architecture is known not to take it."""
    policy = Policy(adapted(kind, **options)).eval()
    with pytest.raises(UserError) if (kind, layout) in REFUSED else nullcontext():
        choose_layout(policy, layout, longest_row=max(row.length for row in ROWS), device=torch.device("cpu"))
    if (kind, layout) in REFUSED:
        pytest.skip(f"{kind} cannot take {layout.value}")
    assert policy.layout is layout
    return policy


def batch_for(policy: Policy) -> Batch:
    return collate(ROWS, layout=policy.layout, pad_token_id=0)


def outcome(policy: Policy) -> list[torch.Tensor]:
    """Log-probabilities, then the gradients of the adapter."""
    logps = policy(batch_for(policy))
    return [logps, *torch.autograd.grad((logps * torch.linspace(-1, 2, len(logps))).sum(), factors(policy))]


def everywhere(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """The policy with its last layer computed at all positions."""
    monkeypatch.setattr(policy.read_positions, "only", lambda positions: nullcontext())
    return policy


def positions_seen(policy: Policy, *names: str) -> dict[str, int]:
    """How many positions the inputs of these modules had in one forward."""
    seen: dict[str, int] = {}
    hooks = [
        policy.base.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: inputs[0].shape[:-1].numel()})
        )
        for name in names
    ]
    with torch.no_grad():
        policy(batch_for(policy))
    for hook in hooks:
        hook.remove()
    return seen


class TestReadPositions:
    @pytest.mark.parametrize("replaced", [False, True])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_log_probabilities_and_gradients_are_the_same(
        self, kind: str, layout: RowLayout, replaced: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = chosen(kind, layout)
        if replaced:
            replace_small_operations(policy.base)
        got, expected = outcome(policy), outcome(everywhere(policy, monkeypatch))
        assert len(got) == 9
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) < 1e-6

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_the_last_layer_sees_only_what_is_read(self, kind: str, layout: RowLayout, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = chosen(kind, layout)
        batch = batch_for(policy)
        parts = ("mlp", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj", "self_attn.k_proj", "self_attn.v_proj")
        names = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts]
        read, all_of_them = len(batch.read), batch.input_ids.numel()
        assert 0 < read < all_of_them
        numbers = [all_of_them] * 6 + [read] * 4 + [all_of_them] * 2
        assert positions_seen(policy, *names) == dict(zip(names, numbers, strict=True))
        assert positions_seen(everywhere(policy, monkeypatch), *names) == dict.fromkeys(names, all_of_them)

    def test_generation_after_a_forward_is_unaffected(self) -> None:
        policy = chosen("qwen2", RowLayout.packed)
        ids = torch.arange(24).view(2, 12) + 5
        generate = lambda: policy.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)  # noqa: E731
        untouched = adapted("qwen2").generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        assert untouched.shape == (2, 20)
        outcome(policy)
        assert generate().equal(untouched)
        with torch.no_grad():
            assert policy.model(input_ids=ids).logits.equal(adapted("qwen2")(input_ids=ids).logits)

    def test_a_forward_that_fails_leaves_nothing_behind(self) -> None:
        policy = chosen("llama", RowLayout.concatenated)
        ids = torch.arange(24).view(2, 12)
        with torch.no_grad():
            before = policy.model(input_ids=ids).logits

        def fail(*inputs: object) -> None:
            raise MemoryError

        hook = policy.base.get_decoder().norm.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            policy(batch_for(policy))
        hook.remove()
        with torch.no_grad():
            assert policy.model(input_ids=ids).logits.equal(before)

    def test_a_model_that_names_its_parts_differently_is_left_alone(self) -> None:
        torch.manual_seed(1)
        config = AutoConfig.for_model("gpt2", vocab_size=83, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"))
        fill_adapters(model)
        policy = Policy(model).eval()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
        names = [f"transformer.h.1.{name}" for name in ("mlp", "attn.c_attn", "attn.c_proj")]
        assert set(positions_seen(policy, *names).values()) == {batch_for(policy).input_ids.numel()}
        logps = outcome(policy)[0]
        for row, got in zip(ROWS, logps.detach().view(-1, 2), strict=True):
            for response, logp in zip(row.responses, got, strict=True):
                ids = torch.tensor([[*row.prompt, *response]])
                with torch.no_grad():
                    tokens = base(ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
                torch.testing.assert_close(logp, tokens.gather(1, torch.tensor(response)[:, None]).sum())

    @pytest.mark.parametrize("replaced", [False, True])
    @pytest.mark.parametrize("zero_stage", [2, 3])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_gradient_checkpointing_gives_the_same_gradients(self, layout: RowLayout, zero_stage: int, replaced: bool) -> None:
        """In the re-entrant form, which ZeRO-3 needs, and in the other."""
        policy = chosen("llama", layout)
        if replaced:
            replace_small_operations(policy.base)
        expected = outcome(policy.train())
        enable_gradient_checkpointing(policy.model, zero_stage=zero_stage)
        runs: list[int] = []
        policy.base.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
        logps = policy(batch_for(policy))
        # The re-entrant form knows only backward(), not the gradient of chosen tensors.
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        assert len(runs) == 2
        for got, wanted in zip([logps, *(p.grad for p in factors(policy))], expected, strict=True):
            assert error(got, wanted) < 1e-6

    def test_checkpointing_does_not_stand_in_the_way_of_evaluation(self) -> None:
        """Nothing is run again where nothing is trained."""
        policy = chosen("llama", RowLayout.packed)
        enable_gradient_checkpointing(policy.model, zero_stage=2)
        name, batch = "model.layers.1.mlp", batch_for(policy)
        assert positions_seen(policy.eval(), name) == {name: len(batch.read)}
        assert positions_seen(policy.train(), name) == {name: batch.input_ids.numel()}
