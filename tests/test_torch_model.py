"""CoterieForCausalLM as a transformers model: files, KV cache, padding, ties, losses."""

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.torch import CoterieConfig, CoterieForCausalLM, Router, RouterConfig, RouterDraws

NAMES = ["coterie_pyramid", "coterie_gpt_style", "coterie_deepseek_style"]


def tokens(length: int = 20) -> torch.Tensor:
    return torch.tensor([tiny_models.prompt(length, seed=1), tiny_models.prompt(length, seed=2)])


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_opened_again(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    opened = AutoModelForCausalLM.from_pretrained(tiny_models.save(model, tmp_path)).eval()
    assert type(opened) is CoterieForCausalLM
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == model.config.tie_word_embeddings
    state = opened.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():  # torch's sums depend on where weights lie in memory
        torch.testing.assert_close(opened(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path).layer_configs() == model.config.layer_configs()


def test_choice_biases_stay_fp32(tmp_path: Path) -> None:
    model = tiny_models.build("coterie_deepseek_style")
    opened = AutoModelForCausalLM.from_pretrained(tiny_models.save(model, tmp_path), dtype=torch.bfloat16)
    router = opened.model.layers[1].router
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.choice_bias, model.model.layers[1].router.choice_bias)


@pytest.mark.parametrize("name", NAMES)
def test_cache_and_padding_change_nothing(name: str) -> None:
    model = tiny_models.build(name)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(), use_cache=False, **options)[:, 20:]
    assert torch.equal(model.generate(tokens(), use_cache=True, **options)[:, 20:], expected)
    padding = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(tokens())], dim=1)
    padded = model.generate(torch.cat([padding, tokens()], dim=1), attention_mask=mask, **options)
    assert torch.equal(padded[:, 25:], expected)


def test_labels_are_shifted_and_losses_added() -> None:
    model = tiny_models.build("coterie_pyramid")
    model.balance_loss_coef, model.z_loss_coef = 0.5, 0.25
    inputs = tokens()
    labels = inputs.clone()
    labels[0, :7] = -100
    output = model(inputs, labels=labels)
    scored = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.ce_loss, scored)
    torch.testing.assert_close(output.loss, scored + 0.5 * output.balance_loss + 0.25 * output.z_loss)


def router_of_logits(logits: torch.Tensor, top_k: int, **settings: object) -> Router:
    """A router whose logits for token t are row t, when token t is the t-th unit vector."""
    router = Router(len(logits), logits.shape[1], top_k, RouterConfig(**settings))
    router.weight.data = logits.T.contiguous()
    return router.train()


def test_equal_scores_go_to_the_lower_expert() -> None:
    routing = router_of_logits(torch.zeros(3, 5), top_k=2)(torch.eye(3))
    assert routing.expert_ids_TK.tolist() == [[0, 1]] * 3


def test_first_choices_claim_places_before_second_ones() -> None:
    # Tokens 0..2 want expert 0 first and 1 second, token 3 the reverse; an expert takes 2.
    logits = torch.tensor([[3.0, 2.0, 0.0, 0.0]] * 3 + [[2.0, 3.0, 0.0, 0.0]])
    router = router_of_logits(logits, top_k=2, capacity_factor=1.0, min_capacity=1)
    kept = router(torch.eye(4), RouterDraws(order_T=torch.arange(4))).kept_TK.tolist()
    assert kept == [[True, True], [True, False], [False, False], [True, False]]
    backwards = router(torch.eye(4), RouterDraws(order_T=torch.tensor([3, 2, 1, 0]))).kept_TK.tolist()
    assert backwards == [[False, False], [True, False], [True, True], [True, False]]
    assert router.eval()(torch.eye(4)).kept_TK.all(), "capacity is for training"


def test_groups_by_hand() -> None:
    # Groups (0, 1), (2, 3), (4, 5): the first has the best expert, the second the best pair.
    logits = torch.tensor([[0.9, 0.0, 0.8, 0.7, 0.1, 0.2]])
    by_max = router_of_logits(logits, top_k=2, num_groups=3)(torch.eye(1))
    assert by_max.expert_ids_TK.tolist() == [[0, 1]]
    by_pair = router_of_logits(logits, top_k=2, num_groups=3, group_score="top2")(torch.eye(1))
    assert by_pair.expert_ids_TK.tolist() == [[2, 3]]
    two = router_of_logits(logits, top_k=3, num_groups=3, top_k_groups=2)(torch.eye(1))
    assert two.expert_ids_TK.tolist() == [[0, 2, 3]]


def test_probability_keeps_the_highest_scores() -> None:
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    router = router_of_logits(logits, top_k=1, capacity_factor=1.0, min_capacity=1, drop_policy="probability")
    assert router(torch.eye(4)).kept_TK.flatten().tolist() == [False, True, False, True]


def test_experts_choose_by_hand() -> None:
    # Each of 2 experts takes its best 2 of 4 tokens; token 3 is taken by nobody.
    logits = torch.tensor([[2.0, 1.0], [3.0, 0.0], [0.0, 4.0], [1.0, 0.5]])
    router = router_of_logits(
        logits, top_k=1, score_function="sigmoid", chooser="experts", capacity_factor=1.0, min_capacity=1
    )
    routing = router(torch.eye(4))
    assert routing.kept_TK.tolist() == [[True, True], [True, False], [False, True], [False, False]]
    torch.testing.assert_close(routing.weights_TK, logits.sigmoid() * routing.kept_TK)
    assert router.eval()(torch.eye(4)).expert_ids_TK.flatten().tolist() == [0, 0, 1, 0], "tokens choose in evaluation"


def test_noise_is_for_training_and_for_the_choice() -> None:
    logits = torch.zeros(200, 4)
    router = router_of_logits(logits, top_k=1, choice_noise="rsample")
    torch.manual_seed(0)
    routing = router(torch.eye(200))
    assert routing.expert_ids_TK.unique().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(routing.weights_TK, torch.full((200, 1), 0.25))
    assert router.eval()(torch.eye(200)).expert_ids_TK.unique().tolist() == [0]


def test_bias_chooses_and_does_not_weigh() -> None:
    router = router_of_logits(torch.zeros(1, 3), top_k=1, score_function="sigmoid", choice_bias=True)
    router.choice_bias[2] = 0.1
    routing = router(torch.eye(1))
    assert routing.expert_ids_TK.tolist() == [[2]]
    assert routing.weights_TK.tolist() == [[0.5]]


def test_balance_loss_by_hand() -> None:
    # Top-1: experts 0, 0, 1 of 2. f = (2/3, 1/3), p = mean softmax.
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    p = logits.softmax(-1).mean(0)
    routing = router_of_logits(logits, top_k=1)(torch.eye(3))
    torch.testing.assert_close(routing.balance_loss(), 2 * (2 / 3 * p[0] + 1 / 3 * p[1]))
    torch.testing.assert_close(routing.z_loss(), logits.logsumexp(-1).square().mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "batch_norm"}, r"norm_type \(batch_norm\)"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) is not a multiple of num_key_value_heads \(4\)"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers \(3\)"),
        ({"layers": [{"num_experts": 2, "top_k": 3}]}, r"top_k \(3\) exceeds num_experts \(2\)"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_scaling .* is not trained"),
        ({"attention_sinks": True}, r"attention_sinks \(True\) is not trained"),
        ({"layers": [{"window": 3}]}, r"layers\[0\]: unknown key 'window'"),
        ({"layers": [{"experts": 2}]}, r"layers\[0\]: unknown key 'experts'"),
        ({"layers": [{"num_experts": 2, "router": {"noise": 1}}]}, r"layers\[0\].router: unknown key 'noise'"),
        ({"layers": [{"num_experts": 2, "router": {"jitter": 1}}]}, r"\[router\] jitter \(1\) is not in \[0, 1\)"),
        ({"layers": [{"num_experts": 2, "router": {"drop_policy": "x"}}]}, r"\[router\] drop_policy \(x\) is not one"),
        ({"layers": [{"num_experts": 2, "router": {"num_groups": 3}}]}, r"\[router\] num_groups \(3\) does not divide"),
        ({"layers": [{"num_experts": 2, "router": {"chooser": "experts"}}]}, r"\[router\] chooser \(experts\) needs"),
    ],
)
def test_impossible_configurations_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_models.coterie_config(**changes)


def test_defaults_are_a_dense_model() -> None:
    config = CoterieConfig(num_hidden_layers=2)
    assert [layer.num_experts for layer in config.layer_configs()] == [0, 0]
