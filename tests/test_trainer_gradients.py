"""Every gradient of the trainer against autograd on the plain PyTorch model, tensor by tensor."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import save_file

import coterie.torch  # noqa: F401  (and torch, which coterie._train needs loaded)
from coterie import _train
from coterie.torch import CoterieConfig, CoterieForCausalLM, RouterDraws

BATCH, LENGTH = 2, 24
SEED, STEP = 11, 5  # of the router's random choices
RANK, GUMBEL, JITTER = 1, 2, 3  # streams of src/moe/router_random.cc
BALANCE_LOSS, Z_LOSS = 0.05, 0.01  # large, so that their gradients count

# Relative to a tensor's largest gradient: sums of up to a few thousand fp32 terms in another order.
FP32_TOLERANCE = 1e-4


def philox(key: int, counter_high: int, counter_low: int) -> list[int]:
    """The four words of Philox4x32-10 (Salmon et al. 2011), slow and obvious."""
    mask = 2**32 - 1
    k0, k1 = key & mask, key >> 32
    c = [counter_low & mask, counter_low >> 32, counter_high & mask, counter_high >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


def random_words(stream: int, layer: int, token: int, count: int) -> list[int]:
    """The first words of a token's stream."""
    high = stream << 60 | layer << 44 | STEP
    return [philox(SEED, high, token << 24 | index // 4)[index % 4] for index in range(count)]


def draws(num_tokens: int, layer: int, num_experts: int, hidden_size: int, jitter: float) -> RouterDraws:
    """The random choices of one layer's router."""

    def words(stream: int, count: int) -> torch.Tensor:
        rows = [random_words(stream, layer, token, count) for token in range(num_tokens)]
        return torch.tensor(rows, dtype=torch.float64).floor_divide(2**8)

    ranks = [random_words(RANK, layer, token, 1)[0] for token in range(num_tokens)]
    order = torch.tensor(sorted(range(num_tokens), key=ranks.__getitem__))
    gumbel = -torch.log(-torch.log((words(GUMBEL, num_experts) + 0.5) / 2**24))
    factors = 1 + jitter * (2 * words(JITTER, hidden_size) / 2**24 - 1) if jitter else None
    return RouterDraws(order, gumbel.float(), None if factors is None else factors.float())


def draws_of_model(config: CoterieConfig) -> list[RouterDraws]:
    """The random choices of every MoE layer."""
    return [
        draws(BATCH * LENGTH, index, layer.num_experts, config.hidden_size, layer.router.jitter)
        for index, layer in enumerate(config.layer_configs())
        if layer.num_experts
    ]


def pr_moe(
    residual: str, top_k: int, capacity_factor: float = 0.0, router: dict[str, object] | None = None, **changes: object
) -> CoterieConfig:
    """Two layers, the second with twice the experts."""
    router = {"capacity_factor": capacity_factor, "min_capacity": 2, "normalize": top_k > 1, **(router or {})}
    layers = []
    for num_experts in (4, 8):
        layer = {"num_experts": num_experts, "top_k": top_k, "expert_intermediate_size": 20, "residual": residual}
        layers.append({**layer, "router": router} | ({} if residual == "none" else {"intermediate_size": 28}))
    return tiny_models.coterie_config(layers=layers, **changes)


def windows() -> np.ndarray:
    """Token ids [B, S + 1]."""
    return np.array(tiny_models.prompt(BATCH * (LENGTH + 1), seed=4), dtype=np.int32).reshape(BATCH, LENGTH + 1)


def save_logical(model: CoterieForCausalLM, directory: Path) -> str:
    """The model's tensors under their logical names, tied ones once."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    path = directory / "model.safetensors"
    save_file(state, path)
    return str(path)


def oracle(config: CoterieConfig, seed: int, rounded: bool = False) -> CoterieForCausalLM:
    """The plain PyTorch model in training mode, in fp32; its matrices rounded to bf16 if asked."""
    model = tiny_models.seeded(lambda: CoterieForCausalLM(config), seed).train()
    model.balance_loss_coef, model.z_loss_coef = BALANCE_LOSS, Z_LOSS
    if rounded:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and not name.endswith(("bias", "router.weight", "mix.weight")):
                    parameter.copy_(parameter.bfloat16())
    return model


def run_oracle(model: CoterieForCausalLM) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The losses and gradients of one training step."""
    tokens = torch.from_numpy(windows()).long()
    output = model(tokens[:, :-1], shift_labels=tokens[:, 1:], draws=draws_of_model(model.config))
    output.loss.backward()
    losses = {"loss": output.ce_loss, "balance_loss": output.balance_loss, "z_loss": output.z_loss}
    if any(layer.router.chooser == "experts" for layer in model.config.layer_configs()):
        del losses["balance_loss"]  # there is nothing to balance
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return {name: value.item() for name, value in losses.items()}, gradients


def load_trainer(model: CoterieForCausalLM, directory: Path, dtype: str) -> _train.Model:
    """The C++ trainer's model with the same weights."""
    trainer = _train.Model(model.config.to_json_string(), dtype, 0)
    trainer.load(save_logical(model, directory))
    return trainer


def run_trainer(trainer: _train.Model, choices: str = "all") -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The same losses and gradients of the C++ trainer."""
    return trainer.loss_and_gradients(
        windows(),
        balance_loss=BALANCE_LOSS,
        z_loss=Z_LOSS,
        seed=SEED,
        step=STEP,
        balance_loss_choices=choices,
    )


def scale_of(gradients: dict[str, np.ndarray], name: str) -> float:
    """What an error of this tensor's gradient is measured by: its own largest entry.

    A key's bias adds the same to all scores of a query where nothing rotates: its gradient is zero but
    for rounding, and is measured by that of the query's bias.
    """
    names = (name, name.replace("k_proj.bias", "q_proj.bias"))
    return max(float(np.abs(gradients[n]).max()) for n in names)


# top_k, capacity factor and router; the layers have 4 and 8 experts.
ROUTERS = {
    "groups-max": (2, 0.0, {"num_groups": 4, "top_k_groups": 2, "score_function": "sigmoid"}),
    "groups-top2": (1, 0.75, {"num_groups": 2, "group_score": "top2"}),
    "choice-bias": (2, 0.75, {"choice_bias": True, "score_function": "sigmoid", "normalize_over": "kept"}),
    "choice-bias-everything": (
        2,
        0.75,
        {
            "choice_bias": True,
            "num_groups": 2,
            "top_k_groups": 1,
            "group_score": "top2",
            "choice_noise": "second_expert",
            "drop_policy": "probability",
        },
    ),
    "kept": (2, 0.75, {"normalize_over": "kept"}),
    "kept-position": (2, 0.75, {"normalize_over": "kept", "drop_policy": "position"}),
    "kept-probability": (3, 0.75, {"normalize_over": "kept", "drop_policy": "probability"}),
    "probability-sigmoid": (2, 0.5, {"score_function": "sigmoid", "drop_policy": "probability"}),
    "rsample": (1, 0.75, {"choice_noise": "rsample"}),
    "rsample-groups": (3, 0.0, {"choice_noise": "rsample", "num_groups": 2, "top_k_groups": 2}),
    "second-expert": (2, 1.0, {"choice_noise": "second_expert", "normalize_over": "kept"}),
    "jitter": (2, 0.75, {"jitter": 0.3, "choice_noise": "second_expert"}),
    "expert-choice": (2, 1.0, {"chooser": "experts", "normalize": False}),
    "expert-choice-normalized": (2, 0.75, {"chooser": "experts", "score_function": "sigmoid", "jitter": 0.1}),
}

CASES = {
    **{
        f"{residual}-top{top_k}-{'capacity' if capacity else 'dropless'}": pr_moe(residual, top_k, capacity)
        for residual, top_k, capacity in itertools.product(
            ("none", "sum", "learned", "shared_gate"), (1, 2), (0.0, 0.75)
        )
    },
    "ungated-biased-layernorm": pr_moe(
        "learned",
        2,
        0.75,
        gated_mlp=False,
        hidden_act="gelu_new",
        norm_type="layer_norm",
        position_embedding_type="learned",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "gated-biased-headnorm": pr_moe("sum", 1, 0.75, mlp_bias=True, attention_bias=True, qk_norm="head"),
    **{f"router-{name}": pr_moe("sum", top_k, capacity, router) for name, (top_k, capacity, router) in ROUTERS.items()},
    "fullnorm-clipped": pr_moe("shared_gate", 2, 0.0, qk_norm="full", clip_qkv=1.0, tie_word_embeddings=False),
}


@pytest.mark.parametrize("case", CASES)
def test_fp32_gradients(case: str, tmp_path: Path) -> None:
    model = oracle(CASES[case], seed=0)
    check_fp32(model, load_trainer(model, tmp_path, "fp32"))


def test_fp32_gradients_of_first_choices_balance(tmp_path: Path) -> None:
    model = oracle(CASES["sum-top2-capacity"], seed=0)
    trainer = load_trainer(model, tmp_path, "fp32")
    all_choices = run_trainer(trainer)[0]["balance_loss"]
    model.balance_loss_choices = "first"
    losses = check_fp32(model, trainer)
    assert losses["balance_loss"] != pytest.approx(all_choices, rel=1e-3), "the choice of choices decides nothing"


def check_fp32(model: CoterieForCausalLM, trainer: _train.Model) -> dict[str, float]:
    """Losses and gradients of the trainer are the oracle's; the losses."""
    expected_losses, expected = run_oracle(model)
    losses, gradients = run_trainer(trainer, model.balance_loss_choices)
    for name, value in expected_losses.items():
        assert losses[name] == pytest.approx(value, rel=1e-5), name
    assert set(losses) == set(expected_losses)
    assert set(gradients) == set(expected)
    errors = {
        name: float(np.abs(gradients[name] - gradient).max() / scale_of(expected, name))
        for name, gradient in expected.items()
    }
    assert max(errors.values()) < FP32_TOLERANCE, max(errors, key=errors.get)
    return losses


@pytest.mark.parametrize("case", ["sum-top1-capacity", "sum-top2-capacity"])
def test_capacity_drops(case: str) -> None:
    """The cases above do drop, and the random order decides whom."""
    model = oracle(CASES[case], seed=0)
    router = model.model.layers[0].router
    x = torch.randn(BATCH * LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    by_order = router(x, draws(BATCH * LENGTH, 0, router.num_experts, x.shape[1], 0.0)).kept_TK
    by_position = router(x, RouterDraws(order_T=torch.arange(len(x)))).kept_TK
    assert not by_order.all()
    assert not torch.equal(by_order, by_position)


@pytest.mark.parametrize(
    ("case", "seed"),  # seeds for which no rounding changes an expert
    [("sum-top1-dropless", 3), ("learned-top2-dropless", 4), ("sum-top1-capacity", 3), ("sum-top2-capacity", 1)],
)
def test_bf16_gradients(case: str, seed: int, tmp_path: Path) -> None:
    """The trainer in bf16 rounds operands of products and gradients of matrices to 8 bits; the oracle
    has the same rounded weights and computes in fp32.

    A rounding has a relative error of at most u = 2^-8, uniformly spread: u / sqrt(3) in the mean
    square. Squares of independent errors add up: N roundings on the way leave sqrt(N / 3) * u. Forward
    those are the inputs of 8 products in each layer and of the head, backward two operands of each
    product, and one rounding of the result; twice that, for what norms, softmax and the mixture of
    experts amplify. A token that meets another expert is another function, so none may.
    """
    model = oracle(CASES[case], seed, rounded=True)
    expected_losses, expected = run_oracle(model)
    trainer = load_trainer(model, tmp_path, "bf16")
    losses, gradients = run_trainer(trainer)
    assert_same_experts(trainer, model)
    roundings = 3 * (8 * model.config.num_hidden_layers + 1) + 1
    tolerance = 2 * math.sqrt(roundings / 3) * 2**-8
    assert losses["loss"] == pytest.approx(expected_losses["loss"], rel=tolerance)
    errors = {
        name: float(np.linalg.norm(gradients[name] - gradient) / np.linalg.norm(gradient))
        for name, gradient in expected.items()
    }
    assert max(errors.values()) < tolerance, max(errors, key=errors.get)
    assert max(errors.values()) > FP32_TOLERANCE, "nothing was rounded: is this bf16?"


def assert_same_experts(trainer: _train.Model, model: CoterieForCausalLM) -> None:
    """The training step meets the same experts in both, in the same order where that decides who is dropped."""
    drops = model.config.layers[0]["router"]["capacity_factor"] > 0
    inputs = np.ascontiguousarray(windows()[:, :-1])
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs).long(), draws=draws_of_model(model.config)).expert_ids
    chosen = trainer.expert_ids(inputs, training=True, seed=SEED, step=STEP)
    for ids, reference in zip(chosen, expected, strict=True):
        pair = (ids, reference.numpy()) if drops else (np.sort(ids), np.sort(reference.numpy()))
        np.testing.assert_array_equal(*pair, "give this case another seed")


def test_names_shapes_and_initial_values() -> None:
    config = CASES["ungated-biased-layernorm"]
    parameters = _train.Model(config.to_json_string(), "fp32", 3).parameters()
    expected = dict(CoterieForCausalLM(config).named_parameters())
    assert {name: value.shape for name, value in parameters.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    for name, value in parameters.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            writes_residual = name.endswith(("o_proj.weight", "down.weight"))
            std = config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if writes_residual else 1)
            # The standard deviation of n normal values is off by 1/sqrt(2n) of itself, times 5.
            assert value.std() == pytest.approx(std, rel=5 / math.sqrt(2 * value.size)), name
            assert abs(value.mean()) < 5 * std / math.sqrt(value.size), name
