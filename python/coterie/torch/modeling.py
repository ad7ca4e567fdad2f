"""CoterieForCausalLM in plain PyTorch: a decoder with a Mixture of Experts in any of its layers.

It opens the files that Coterie exports (the names of its parameters are the names of the stored
tensors) and is the oracle of the engine's and the trainer's tests, so it favours reading over speed.
Legend: B batch, S new tokens of a sequence, P all its tokens so far, D hidden, H query heads,
G key/value heads, d head_dim, V vocabulary, T = B * S.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from coterie.torch.configuration import CoterieConfig
from coterie.torch.moe import MLP, ExpertLinear, Experts, LayerConfig, Router, RouterDraws, Routing


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return y.to(x.dtype)


def make_norm(config: CoterieConfig) -> nn.Module:
    """The norm of the residual stream."""
    kind = RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def rotate(x_BHSd: Tensor, positions_BS: Tensor, theta: float) -> Tensor:
    """Rotary positions (RoFormer): element i turns with element i + d/2 by position * theta^(-2i/d)."""
    d = x_BHSd.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, d, 2, device=x_BHSd.device).float() / d)
    angle_B1Sd = (positions_BS[..., None].float() * frequency)[:, None]
    first, second = x_BHSd.float().chunk(2, dim=-1)
    cos, sin = angle_B1Sd.cos(), angle_B1Sd.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHSd.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention; G = H is multi-head attention."""

    def __init__(self, config: CoterieConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        D, H, G, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * d, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, G * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, G * d, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.attention_output_bias)
        self.o_proj.writes_residual = True
        if config.qk_norm != "none":
            self.q_norm = RMSNorm(d if config.qk_norm == "head" else H * d, config.norm_eps)
            self.k_norm = RMSNorm(d if config.qk_norm == "head" else G * d, config.norm_eps)

    def forward(self, x_BSD: Tensor, positions_BS: Tensor, mask_B1SP: Tensor, cache: Cache | None) -> Tensor:
        config = self.config
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (z.unflatten(-1, (-1, config.head_dim)) for z in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if config.clip_qkv:
            q, k, v = (z.clamp(-config.clip_qkv, config.clip_qkv) for z in (q, k, v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if config.position_embedding_type == "rope":
            q, k = rotate(q, positions_BS, config.rope_theta), rotate(k, positions_BS, config.rope_theta)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores_BHSP = (q @ k.transpose(-1, -2)).float() / math.sqrt(config.head_dim)
        # The smallest number and not -inf: a padding token that sees nothing must not become NaN.
        scores_BHSP = scores_BHSP.masked_fill(~mask_B1SP, torch.finfo(torch.float32).min)
        out_BHSd = scores_BHSP.softmax(-1).to(v.dtype) @ v
        return self.o_proj(out_BHSd.transpose(1, 2).flatten(-2))


class DecoderLayer(nn.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: CoterieConfig, layer: LayerConfig, layer_index: int) -> None:
        super().__init__()
        self.residual = layer.residual
        D, mlp = config.hidden_size, (config.hidden_act, config.gated_mlp, config.mlp_bias)
        self.input_norm = make_norm(config)
        self.attention = Attention(config, layer_index)
        self.post_attention_norm = make_norm(config)
        self.router = self.experts = self.mlp = self.mix = None
        if layer.num_experts:
            # Outside of training the whole model is dropless, as the engine is.
            self.router = Router(D, layer.num_experts, layer.top_k, replace(layer.router, eval_capacity_factor=0.0))
            self.experts = Experts(layer.num_experts, D, layer.expert_intermediate_size, *mlp)
        if not layer.num_experts or layer.residual != "none":
            self.mlp = MLP(D, layer.intermediate_size, *mlp)
        if layer.residual == "learned":
            self.mix = nn.Linear(D, 2, bias=True)
        elif layer.residual == "shared_gate":
            self.mix = nn.Linear(D, 1, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        positions_BS: Tensor,
        mask_B1SP: Tensor,
        cache: Cache | None = None,
        draws: RouterDraws | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.attention(self.input_norm(x_BSD), positions_BS, mask_B1SP, cache)
        y_TD, routing = self.feed_forward(self.post_attention_norm(x_BSD).flatten(0, 1), draws)
        return x_BSD + y_TD.view_as(x_BSD), routing

    def feed_forward(self, x_TD: Tensor, draws: RouterDraws | None = None) -> tuple[Tensor, Routing | None]:
        """The dense MLP, or the experts with what stands beside them (see LayerConfig)."""
        if self.router is None:
            return self.mlp(x_TD), None
        routing = self.router(x_TD, draws)
        y_TD = self.experts(x_TD, routing)
        if self.residual == "sum":
            y_TD = self.mlp(x_TD) + y_TD
        elif self.residual == "learned":
            c_T2 = self.mix(x_TD).softmax(-1)
            y_TD = c_T2[:, 0:1] * y_TD + c_T2[:, 1:2] * self.mlp(x_TD)
        elif self.residual == "shared_gate":
            y_TD = y_TD + self.mix(x_TD).sigmoid() * self.mlp(x_TD)
        return y_TD, routing


class CoteriePreTrainedModel(PreTrainedModel):
    config_class = CoterieConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = {"choice_bias"}  # its steps are smaller than bf16's

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """normal(0, initializer_range); what writes into the residual stream is smaller by sqrt(2 * layers)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | ExpertLinear | nn.Embedding | Router):
            if getattr(module, "writes_residual", False):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            init.ones_(module.weight)
        for name in ("bias", "choice_bias"):
            if getattr(module, name, None) is not None:
                init.zeros_(getattr(module, name))


class CoterieModel(CoteriePreTrainedModel):
    """Embeddings, layers, final norm."""

    def __init__(self, config: CoterieConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, index) for index, layer in enumerate(config.layer_configs())
        )
        self.norm = make_norm(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        draws: Sequence[RouterDraws] | None = None,
    ) -> tuple[Tensor, Cache | None, list[Routing]]:
        """Hidden states [B, S, D], the cache, and the routing of every MoE layer."""
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, S = x_BSD.shape[:2]
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        place_S = torch.arange(past, past + S, device=x_BSD.device)
        positions_BS = place_S.expand(B, S) if position_ids is None else position_ids.expand(B, S)
        mask_B1SP = (torch.arange(past + S, device=x_BSD.device) <= place_S[:, None]).expand(B, 1, S, past + S)
        if attention_mask is not None:
            mask_B1SP = mask_B1SP & attention_mask[:, None, None, :].bool()
        if self.config.position_embedding_type == "learned":
            x_BSD = x_BSD + self.embed_positions(positions_BS)

        next_draws = iter(draws or ())
        routings = []
        for layer in self.layers:
            layer_draws = None if layer.router is None else next(next_draws, None)
            x_BSD, routing = layer(x_BSD, positions_BS, mask_B1SP, past_key_values, layer_draws)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_BSD), past_key_values, routings


@dataclass
class CoterieOutput(ModelOutput):
    """What a forward pass returns.

    Parameters
    ----------
    loss
        ce_loss + balance_loss_coef * balance_loss + z_loss_coef * z_loss; only with labels.
    balance_loss, z_loss
        Sums over the MoE layers; None in a dense model.
    expert_ids
        Of every MoE layer [B * S, K], the chosen experts (dropped choices too).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    ce_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    expert_ids: tuple[Tensor, ...] | None = None


class CoterieForCausalLM(CoteriePreTrainedModel, GenerationMixin):
    """The decoder with its output layer, whose weight may be the embedding's.

    Attributes
    ----------
    balance_loss_coef, z_loss_coef
        Factors of the router's two losses in the training loss. They belong to a run and not to the
        model, so they are not in its configuration.
    balance_loss_choices
        Whose balance: "all" choices, or the "first" ones.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CoterieConfig) -> None:
        super().__init__(config)
        self.model = CoterieModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.balance_loss_coef = 0.0
        self.z_loss_coef = 0.0
        self.balance_loss_choices = "all"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        draws: Sequence[RouterDraws] | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> CoterieOutput:
        """Run B sequences.

        Parameters
        ----------
        input_ids
            [B, S].
        attention_mask
            [B, P], 0 for padding.
        labels
            [B, S], shifted here: position s is scored on labels[:, s + 1]; -100 is left out.
        shift_labels
            [B, S], shifted already: position s is scored on shift_labels[:, s].
        logits_to_keep
            Compute logits of the last so many positions only; 0 is all.
        draws
            The random choices of each MoE layer, where they are not to be drawn anew.
        """
        x_BSD, cache, routings = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, draws
        )
        output = CoterieOutput(logits=self.lm_head(x_BSD[:, -logits_to_keep:]), past_key_values=cache)
        if routings:
            output.balance_loss = sum(routing.balance_loss(self.balance_loss_choices) for routing in routings)
            output.z_loss = sum(routing.z_loss() for routing in routings)
            output.expert_ids = tuple(routing.expert_ids_TK for routing in routings)
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            output.ce_loss = output.loss = self.loss_function(
                output.logits, None, self.config.vocab_size, shift_labels=shift_labels.contiguous(), **kwargs
            )
            if routings:
                output.loss = (
                    output.ce_loss + self.balance_loss_coef * output.balance_loss + self.z_loss_coef * output.z_loss
                )
        return output if return_dict is not False else output.to_tuple()
