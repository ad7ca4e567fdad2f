"""experts_implementation="coterie" against transformers' own experts: outputs and every gradient.

Tolerances, of the largest value. fp32: an order of summation changes a dot product of n terms by at most n 2^-24 of
the sum of magnitudes, n <= 512 here, and three layers add theirs: 3 * 512 * 2^-24. bf16: transformers' experts round
to 2^-9 what ours keep in fp32 and the other way round, at most 8 tensors on the way through a layer and back, in
three layers, in the Frobenius norm: 24 * 2^-9, where a wrong path differs by 1.
"""

from collections import Counter

import pytest
import torch
import transformers
from tiny_models import VOCAB_SIZE
from torch import Tensor, nn

import coterie.torch  # noqa: F401  registers the implementation
from coterie.torch.functional import aten_ops

FP32 = 3 * 512 * 2.0**-24
BF16 = 24 * 2.0**-9
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
# Architecture: its configuration, and whether its experts run as one op or in parts.
MODELS = {
    "mixtral": ({"num_local_experts": 5, "num_experts_per_tok": 2}, True),
    "olmoe": ({"num_experts": 9, "num_experts_per_tok": 2}, True),
    "qwen2_moe": ({**MOE, "shared_expert_intermediate_size": 36, "norm_topk_prob": True}, True),
    "qwen3_moe": ({**MOE, "head_dim": 14, "mlp_only_layers": [1]}, True),
    "deepseek_v2": (MLA | {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}, True),
    "deepseek_v3": (MLA | {"n_group": 2, "topk_group": 1}, True),
    "granitemoe": ({"num_local_experts": 6, "num_experts_per_tok": 2, "hidden_act": "gelu_pytorch_tanh"}, True),
    "gpt_oss": ({"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8, "swiglu_limit": 1.0}, False),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(name, **(SIZES | MODELS[name][0]))
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter_name, parameter in model.named_parameters():
        if "norm" not in parameter_name:  # biases and all experts, so that a forgotten one shows
            nn.init.normal_(parameter, std=0.15)
    return model.to(dtype)


def loss_and_gradients(model: nn.Module, implementation: str) -> dict[str, Tensor]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    tokens = torch.randint(0, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(3))
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).abs()
        if dtype == torch.float32:
            assert error.max() <= FP32 * value.abs().max(), name
        else:
            assert error.norm() <= BF16 * value.double().norm(), name


def ops_of(f) -> Counter[str]:
    with torch.profiler.profile() as profile:
        f()
    return Counter(event.name for event in profile.events())


@pytest.mark.parametrize("name", MODELS)
def test_fp32_equals_transformers(name: str) -> None:
    model = build(name)
    expected = loss_and_gradients(model, "eager")
    assert any("experts" in parameter and gradient.any() for parameter, gradient in expected.items())
    assert_close(loss_and_gradients(model, "coterie"), expected, torch.float32)
    ran = ops_of(lambda: loss_and_gradients(model, "coterie"))
    fused = MODELS[name][1]
    assert ("coterie::experts_backward" in ran) == fused
    assert ("coterie::grouped_linear_backward" in ran) != fused
    with aten_ops():
        assert_close(loss_and_gradients(model, "coterie"), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["olmoe", "granitemoe", "gpt_oss"])
def test_packed_weights_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype).eval()
    model.set_experts_implementation("coterie")
    tokens = torch.randint(0, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        with coterie.torch.packed_weights():
            for _ in range(3):
                actual = model(input_ids=tokens).logits
            assert coterie.torch.packed_weight_bytes() > 0
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_equals_transformers(name: str) -> None:
    """One MoE layer alone: through several, a rounding may send a token to another expert."""
    model = build(name, torch.bfloat16)
    moe = next(m for m in model.modules() if hasattr(m, "is_concatenated"))
    T, K, E = 33, 3, moe.num_experts
    x = torch.randn(T, 48, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    ids = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(T, K, generator=torch.Generator().manual_seed(4)).bfloat16().requires_grad_()

    def run(implementation: str) -> dict[str, Tensor]:
        moe.config._experts_implementation = implementation
        out = moe(x, ids, weights)
        names, leaves = zip(*moe.named_parameters(), strict=True)
        gradients = torch.autograd.grad(out.float().square().sum(), [x, weights, *leaves])
        return {"out": out.detach(), **dict(zip(("x", "weights", *names), gradients, strict=True))}

    actual = run("coterie")
    assert all(value.dtype == torch.bfloat16 for value in actual.values())
    assert_close(actual, run("eager"), torch.bfloat16)


class _Experts(nn.Module):
    """What transformers 5 allows and no model above has: transposed without biases, no gate, a norm behind."""

    def __init__(self, config: transformers.PretrainedConfig) -> None:
        super().__init__()
        layout = config.layout
        up = "gate_up_proj" if layout.get("has_gate", True) else "up_proj"
        shapes = {up: (32 if "gate" in up else 16, 24), "down_proj": (24, 16)}
        for name, (out, inputs) in shapes.items():
            shape = (inputs, out) if layout.get("is_transposed") else (out, inputs)
            self.register_parameter(name, nn.Parameter(torch.randn(5, *shape) * 0.2))
            if layout.get("has_bias"):
                self.register_parameter(name + "_bias", nn.Parameter(torch.randn(5, out) * 0.2))
        self.act_fn = transformers.activations.ACT2FN[config.hidden_act]
        self.post_expert_norm = nn.RMSNorm(24)
        self.num_experts = 5

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("eager")


def clamped_gate(self: nn.Module, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=0.3)) * (up.clamp(-0.3, 0.3) + 1)


def layout_experts(layout: dict[str, bool], activation: str = "silu", own_gate: bool = False) -> nn.Module:
    kind = type("LayoutExperts", (_Experts,), {"_apply_gate": clamped_gate} if own_gate else {})
    cls = transformers.integrations.moe.use_experts_implementation(**layout)(kind)
    torch.manual_seed(5)
    experts = cls(transformers.PretrainedConfig(hidden_act=activation, layout=layout))
    experts._is_expert_parallel = True  # ids beyond the experts are choices of none
    return experts


def layout_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x, weights = torch.randn(21, 24, generator=generator), torch.rand(21, 3, generator=generator)
    return x.requires_grad_(), torch.randint(0, 6, (21, 3), generator=generator), weights.requires_grad_()


@pytest.mark.parametrize("own_gate", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu2", "gelu"])
@pytest.mark.parametrize(
    "layout",
    [
        {"is_transposed": True},
        {"is_transposed": True, "has_bias": True},
        {"has_gate": False},
        {"has_gate": False, "has_bias": True},
        {"has_bias": True},
        {"has_post_expert_norm": True},
        {"is_concatenated": False},
    ],
    ids=str,
)
def test_every_layout_equals_batched_mm(layout: dict[str, bool], activation: str, own_gate: bool) -> None:
    experts = layout_experts(layout, activation, own_gate)
    x, ids, weights = layout_inputs()

    def run(implementation: str) -> dict[str, Tensor]:
        experts.config._experts_implementation = implementation
        out = experts(x, ids, weights)
        names, leaves = zip(*experts.named_parameters(), strict=True)
        gradients = torch.autograd.grad(out.square().sum(), [x, weights, *leaves], allow_unused=True)
        values = {"out": out.detach(), **dict(zip(("x", "weights", *names), gradients, strict=True))}
        return {name: value for name, value in values.items() if value is not None}

    assert_close(run("coterie"), run("batched_mm"), torch.float32)
    none = x[:0], ids[:0], weights[:0]
    experts.config._experts_implementation = "coterie"
    out = experts(*none)
    out.sum().backward()
    assert out.shape == none[0].shape


def test_interleaved_weights_run_in_parts_without_copies_of_tokens() -> None:
    """Whatever ``_apply_gate`` makes of them: the op takes the gate's rows for the first half."""
    experts = layout_experts({"is_concatenated": False})
    experts.config._experts_implementation = "coterie"
    ran = ops_of(lambda: experts(*layout_inputs()).sum().backward())
    assert ran["coterie::grouped_linear_backward"] == 2 and not ran["coterie::experts_backward"]
    assert not ran["aten::index_select"]  # products gather and scatter
    assert ran["coterie::combine"] == ran["coterie::combine_backward"] == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_trains_checkpointed_or_around_frozen_experts(name: str, checkpointing: bool) -> None:
    model = build(name).train()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(checkpointing or ".experts." not in parameter_name)
    expected = loss_and_gradients(model, "eager")
    assert any(".experts." in parameter_name for parameter_name in expected) == checkpointing
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(loss_and_gradients(model, "coterie"), expected, torch.float32)
    ran = ops_of(lambda: loss_and_gradients(model, "coterie"))
    forward = ran["coterie::experts_forward"] + ran["coterie::dispatch"]  # as one op or in parts
    assert forward == model.config.num_hidden_layers * (2 if checkpointing else 1)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_compiles_and_generates(name: str) -> None:
    model = build(name).eval()
    model.set_experts_implementation("coterie")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, use_cache=False).logits
    assert_close({"logits": compiled}, {"logits": expected}, torch.float32)
    ours = model.generate(tokens, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("eager")
    assert torch.equal(ours, model.generate(tokens, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_earlier_versions_say_nothing_of_gates_and_norms(name: str) -> None:
    """transformers 5.0 has ``is_transposed`` and ``has_bias`` alone."""
    model = build(name).eval()
    model.set_experts_implementation("coterie")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        for module in model.modules():
            for said in ("has_gate", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel"):
                vars(module).pop(said, None)
        assert torch.equal(model(tokens, use_cache=False).logits, expected)


def test_half_precision_is_refused_in_one_line() -> None:
    model = build("mixtral", torch.float16)
    model.set_experts_implementation("coterie")
    with pytest.raises(TypeError, match="^coterie::experts: x is Half, neither Float nor BFloat16$"):
        model(torch.arange(5)[None])
