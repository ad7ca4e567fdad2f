"""Every gradient of the trainer against autograd on the plain PyTorch model, tensor by tensor."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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
    model.zero_grad()
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


BF16_CASES = ["sum-top1-dropless", "learned-top2-dropless", "sum-top1-capacity", "sum-top2-capacity"]
BF16_ROUNDOFF = 2**-8
# A normal deviation is beyond 5 times its root mean square once in two millions, and the root mean square of 8 draws
# is rarely below three quarters of that.
NOISY_RUNS, DEVIATIONS = 8, 6.5


class Noise(torch.autograd.Function):
    """x and its gradient, each off by a relative error of up to the given sizes, uniformly spread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float, gradient_size: float) -> Tensor:
        ctx.gradient_size = gradient_size
        return x * (1 + size * (2 * torch.rand_like(x) - 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * (1 + ctx.gradient_size * (2 * torch.rand_like(grad) - 1)), None, None


class NoisyProducts(TorchFunctionMode):
    """Every product as far off as bf16 makes it, but for those with the matrices ``exact``.

    Both operands of a product are rounded, and so is the gradient of the result, an operand of both products of
    the backward pass; matrices that are parameters are rounded for good. Queries and keys are rounded twice,
    after the projection and after the rotation.
    """

    def __init__(self, exact: list[Tensor]) -> None:
        super().__init__()
        self.exact = {tensor.data_ptr() for tensor in exact}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        once, twice = BF16_ROUNDOFF, math.sqrt(2) * BF16_ROUNDOFF
        if func is functional.linear and args[1].data_ptr() not in self.exact:
            return Noise.apply(func(Noise.apply(args[0], once, 0.0), *args[1:], **(kwargs or {})), 0.0, once)
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            return Noise.apply(func(*(Noise.apply(x, twice, 0.0) for x in args)), 0.0, once)
        return func(*args, **(kwargs or {}))


class FixedChoices:
    """Stands in for ``Router._choose``: these experts, whatever the scores are, which are noted."""

    def __init__(self, expert_ids_TK: Tensor) -> None:
        self.expert_ids_TK = expert_ids_TK
        self.scores_TE: list[Tensor] = []

    def __call__(self, logits_TE: Tensor, scores_TE: Tensor, draws: RouterDraws) -> Tensor:
        self.scores_TE.append(scores_TE.detach())
        return self.expert_ids_TK

    def assert_best(self) -> None:
        """They are the best by the first scores, but for what the later ones, which are noisy, leave open.

        Each of two scores that change places may be off by what the largest deviation was, or twice that.
        """
        scores_TE, *noisy = self.scores_TE
        deviation = max(float((other - scores_TE).abs().max()) for other in noisy)
        worst_chosen_T = scores_TE.gather(1, self.expert_ids_TK).amin(1)
        last_of_best_T = scores_TE.topk(self.expert_ids_TK.shape[1]).values[:, -1]
        assert (last_of_best_T - worst_chosen_T).max() <= 4 * deviation


def choose_as(model: CoterieForCausalLM, trainer: _train.Model) -> list[FixedChoices]:
    """Gives the model's routers the trainer's choices."""
    chosen = trainer.expert_ids(np.ascontiguousarray(windows()[:, :-1]), training=True, seed=SEED, step=STEP)
    routers = [layer.router for layer in model.model.layers if layer.router is not None]
    for router, ids in zip(routers, chosen, strict=True):
        router._choose = FixedChoices(torch.from_numpy(ids).long())
    return [router._choose for router in routers]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_gradients(case: str, seed: int, tmp_path: Path) -> None:
    """The trainer in bf16 rounds operands of products and gradients of matrices; the oracle has the same rounded
    weights, meets the same experts, and computes in fp32.

    What roundings do to a gradient is found by stochastic arithmetic (Vignes, "A stochastic arithmetic for
    reliable scientific computation", 1993): the oracle runs again and again with a random error of a rounding's
    size wherever the trainer rounds, and the trainer is no farther from the exact run than those runs are.
    """
    assert worst_share(case, seed, tmp_path) < 1


def worst_share(case: str, seed: int, directory: Path) -> float:
    """The largest error of a loss or a gradient, as a share of what is allowed."""
    model = oracle(CASES[case], seed, rounded=True)
    trainer = load_trainer(model, directory, "bf16")
    losses, gradients = run_trainer(trainer)
    choices = choose_as(model, trainer)
    expected_losses, expected = run_oracle(model)
    exact = [p for name, p in model.named_parameters() if name.endswith(("router.weight", "mix.weight"))]
    noisy_runs = []
    for run in range(NOISY_RUNS):
        torch.manual_seed(run)
        with NoisyProducts(exact):
            noisy_runs.append(run_oracle(model))
    for layer in choices:
        layer.assert_best()

    def share(error: float, noise: list[float], own: float) -> float:
        return error / (DEVIATIONS * math.sqrt(sum(d * d for d in noise) / NOISY_RUNS) + own)

    shares = [
        share(abs(losses[name] - value), [noisy[name] - value for noisy, _ in noisy_runs], 1e-5 * abs(value))
        for name, value in expected_losses.items()
    ]
    for name, gradient in expected.items():
        noise = [float(np.linalg.norm(noisy[name] - gradient)) for _, noisy in noisy_runs]
        # It is rounded itself, at the end.
        own = (FP32_TOLERANCE + BF16_ROUNDOFF / math.sqrt(3)) * float(np.linalg.norm(gradient))
        shares.append(share(float(np.linalg.norm(gradients[name] - gradient)), noise, own))
    assert max(shares) > 0.02, "nothing was rounded: is this bf16?"
    return max(shares)


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
