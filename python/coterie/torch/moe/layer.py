"""MoE: a mixture-of-experts layer with DeepSpeed's interface on our router and kernels.

Semantics are those of deepspeed.moe.layer.MoE 0.19. With s the softmax of the gate's logits, an expert
takes at most C = max(ceil(T / E * capacity factor * k), min_capacity) tokens, and a token's output is the sum of
w_e expert_e(x) over the choices that were kept:

k = 1   w = s of the chosen expert; a full expert keeps random tokens (``use_rts``) or the first ones.
k = 2   w = s / (sum of s over the kept choices); all first choices claim places before any second. With
        ``top2_2nd_expert_sampling`` the second is sampled (Gumbel noise), outside of training too.
k > 2   the same weights; a full expert keeps the tokens with the highest s.

Legend: T tokens, D hidden, E experts, K = k.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.torch import functional
from coterie.torch.expert_forms import ExpertForm, recognise
from coterie.torch.moe import RouterConfig, Routing
from coterie.torch.moe.expert_parallel import run_experts_of_ranks
from coterie.torch.ranks import world

RESIDUAL_MIXES = ("learned", "sum")
NOISE_POLICIES = (None, "None", "Jitter", "RSample")
JITTER = 1e-2
# A capacity factor so small that min_capacity alone decides.
NO_FACTOR = 1e-30


class TopKGate(nn.Module):
    """The gate: logits, choices, and the balance loss.

    Attributes
    ----------
    wg
        The logits' matrix, computed in float32 whatever its dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int,
        capacity_factor: float,
        eval_capacity_factor: float,
        min_capacity: int,
        noisy_gate_policy: str | None,
        drop_tokens: bool,
        use_rts: bool,
        top2_2nd_expert_sampling: bool,
    ) -> None:
        super().__init__()
        self.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.num_experts = num_experts
        self.k = k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.noisy_gate_policy = noisy_gate_policy
        self.drop_tokens = drop_tokens
        self.use_rts = use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling

    def capacity(self, num_tokens: int) -> int:
        """Tokens that one expert takes at most."""
        return self._router_config().capacity(num_tokens, self.num_experts, self.k, training=True)

    def forward(self, x_TD: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route T tokens.

        Returns
        -------
        expert_ids, weights
            [T, K]; -1 for a choice that was dropped.
        l_aux
            The balance loss.
        exp_counts
            [E] int64, choices before any was dropped.
        """
        x_TD = x_TD.float()
        if self.training and self.noisy_gate_policy == "Jitter":
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - JITTER, 1 + JITTER)
        logits_TE = functional.router_logits(x_TD, self.wg.weight)
        used_T = used_token.reshape(-1).bool() if used_token is not None and self.k == 1 else None
        routing = self._route(logits_TE, used_T)
        counted_TK = routing.expert_ids_TK[:, : 1 if self.k == 2 else self.k]
        l_aux = self._balance_loss(logits_TE, self._count(counted_TK))
        kept_ids_TK = routing.expert_ids_TK.where(routing.kept_TK, -1)
        return kept_ids_TK, routing.weights_TK, l_aux, self._count(routing.expert_ids_TK)

    def _route(self, logits_TE: Tensor, used_T: Tensor | None) -> Routing:
        config = self._router_config()
        if used_T is None:
            return functional.route(logits_TE, self.k, config, training=True)
        # Unused tokens claim no place, but count where the capacity is computed; their id is -1.
        if self.drop_tokens:
            config = replace(config, capacity_factor=NO_FACTOR, min_capacity=self.capacity(logits_TE.shape[0]))
        routing = functional.route(logits_TE[used_T], self.k, config, training=True)
        shape = (logits_TE.shape[0], self.k)
        weights_TK = logits_TE.new_zeros(shape).masked_scatter(used_T[:, None], routing.weights_TK)
        ids_TK = torch.full(shape, -1, device=logits_TE.device).masked_scatter(used_T[:, None], routing.expert_ids_TK)
        kept_TK = torch.zeros(shape, dtype=torch.bool, device=logits_TE.device)
        return Routing(ids_TK, weights_TK, kept_TK.masked_scatter(used_T[:, None], routing.kept_TK), logits_TE)

    def _router_config(self) -> RouterConfig:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        factor = max(factor, NO_FACTOR) if self.drop_tokens else 0.0
        drops = {"capacity_factor": factor, "min_capacity": self.min_capacity}
        if self.k == 1:
            noise = "rsample" if self.training and self.noisy_gate_policy == "RSample" else "none"
            policy = "random" if self.use_rts else "position"
            return RouterConfig(choice_noise=noise, drop_policy=policy, **drops)
        noise = "second_expert" if self.k == 2 and self.top2_2nd_expert_sampling else "none"
        policy = "position" if self.k == 2 else "probability"
        return RouterConfig(normalize=True, normalize_over="kept", choice_noise=noise, drop_policy=policy, **drops)

    def _count(self, expert_ids_TK: Tensor) -> Tensor:
        """Choices of every expert [E]; ids of -1 count nowhere."""
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=expert_ids_TK.device)
        return counts.scatter_add(0, expert_ids_TK.flatten() + 1, torch.ones_like(expert_ids_TK).flatten())[1:]

    def _balance_loss(self, logits_TE: Tensor, counts_E: Tensor) -> Tensor:
        """E * sum_e f_e p_e with f_e the share of tokens (k > 2: of choices) of e, p_e the mean of s_e."""
        tokens = max(logits_TE.shape[0], 1)
        choices = tokens * (self.k if self.k > 2 else 1)
        return self.num_experts * (logits_TE.softmax(-1).sum(0) / tokens * counts_E / choices).sum()


class GroupedDeepSpeedExperts(nn.Module):
    """Experts of a form that our kernels have: one tensor per matrix, and DeepSpeed's names in the state_dict.

    Every expert begins as a copy of the given one. ``up`` is [E, U, D], ``down`` [E, D, F], biases [E, U] and [E, D].
    """

    def __init__(self, expert: nn.Module, form: ExpertForm, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        for name, names in form.parts.items():
            parts = [form.tensors[part] for part in names]
            stacked = torch.cat([part.detach() for part in parts]).expand(num_experts, *[-1] * parts[0].dim()).clone()
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=parts[0].requires_grad))
        self.form = replace(form, tensors={name: t.detach().to("meta") for name, t in form.tensors.items()})
        self.template = (copy.deepcopy(expert).to("meta"),)  # in a tuple, so that it is no submodule

    def apply(self, fn: Callable[[nn.Module], None]) -> "GroupedDeepSpeedExperts":
        """Let ``fn`` see every expert as the module that was given, with all its layers: initialisations look for them.
        What it does to their parameters counts."""
        places = self._slices()
        for e in range(self.num_experts):
            expert = copy.deepcopy(self.template[0]).to_empty(device=self.up.device)
            held = [
                (parameter, places[f"deepspeed_experts.{e}.{name}"]) for name, parameter in expert.named_parameters()
            ]
            with torch.no_grad():
                for parameter, (stacked, _, rows) in held:
                    parameter.copy_(stacked[e, rows])
            expert.apply(fn)
            with torch.no_grad():
                for parameter, (stacked, _, rows) in held:
                    stacked[e, rows].copy_(parameter)
        fn(self)
        return self

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        biases = (getattr(self, name, None) for name in ("up_bias", "down_bias"))
        return functional.experts(
            x_TD, expert_ids_TK, weights_TK, self.up, self.down, *biases, self.form.activation, self.form.gated
        )

    def logical_parameters(self, first_expert: int, num_experts: int) -> list[tuple[nn.Parameter, str, int, int]]:
        """Each parameter with its name, first row and rows in the layer of all ranks."""
        return [(p, name, first_expert, num_experts) for name, p in self.named_parameters()]

    def _slices(self) -> dict[str, tuple[nn.Parameter, int, slice]]:
        """For every name in DeepSpeed's state_dict: the parameter, the expert and the rows that hold it."""
        places = {}
        for name, names in self.form.parts.items():
            first = 0
            for part in names:
                rows = slice(first, first + self.form.tensors[part].shape[0])
                first = rows.stop
                for e in range(self.num_experts):
                    places[f"deepspeed_experts.{e}.{part}"] = (getattr(self, name), e, rows)
        return places

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name, (parameter, e, rows) in self._slices().items():
            destination[prefix + name] = (parameter if keep_vars else parameter.detach())[e, rows]

    def _take_kinds(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Give parameters the dtype and device of what is loaded into them; experts that aren't keep their values."""
        for name, names in self.form.parts.items():
            keys = (f"{prefix}deepspeed_experts.{e}.{part}" for e in range(self.num_experts) for part in names)
            old, value = getattr(self, name), next((state_dict[key] for key in keys if key in state_dict), None)
            if value is None or (value.dtype, value.device) == (old.dtype, old.device):
                continue
            values = value.new_empty(old.shape) if old.is_meta else old.detach().to(value)
            new = nn.Parameter(values, old.requires_grad)
            new.__dict__.update(old.__dict__)
            setattr(self, name, new)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if local_metadata.get("assign_to_params_buffers", False):
            self._take_kinds(state_dict, prefix)
        places = self._slices()
        for name, (parameter, e, rows) in places.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
            elif value.shape != parameter[e, rows].shape:
                error_msgs.append(f"{prefix}{name}: {tuple(value.shape)} instead of {tuple(parameter[e, rows].shape)}")
            elif parameter.is_meta and not value.is_meta:
                error_msgs.append(f"{prefix}{name}: the experts are on the meta device: load with assign=True")
            else:
                with torch.no_grad():
                    parameter[e, rows].copy_(value)
        known = {prefix + name for name in places}
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key not in known]


class LoopedDeepSpeedExperts(nn.Module):
    """Experts of any form, one after the other.

    One without tokens runs on a row of zeros that nothing comes of: its gradients are zeros then, and not every module
    bears to have no rows at all.
    """

    def __init__(self, expert: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(num_experts))

    def logical_parameters(self, first_expert: int, num_experts: int) -> list[tuple[nn.Parameter, str, int, int]]:
        """Each parameter with its name, first row and rows in the layer of all ranks; 0 of 0 is the whole tensor."""
        return [
            (p, f"deepspeed_experts.{first_expert + e}.{name}", 0, 0)
            for e, expert in enumerate(self.deepspeed_experts)
            for name, p in expert.named_parameters()
        ]

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        order, offset = functional.dispatch(expert_ids_TK, len(self.deepspeed_experts))
        bounds = offset.tolist()
        weights_R = weights_TK.flatten()[order]
        sums = torch.promote_types(x_TD.dtype, torch.float32)
        out_TD = torch.zeros_like(x_TD, dtype=sums)
        for e, expert in enumerate(self.deepspeed_experts):
            rows = slice(bounds[e], bounds[e + 1])
            token = order[rows] // expert_ids_TK.shape[1]
            x = x_TD[token] if len(token) else F.pad(x_TD[token], (0, 0, 0, 1))
            y = first_output(expert(x[None, None]))[0, 0, : len(token)]  # with DeepSpeed's axes: [ranks, 1, tokens, D]
            out_TD = out_TD.index_add(0, token, y.to(sums) * weights_R[rows, None])
        return out_TD.to(functional.result_type(x_TD))


def first_output(output: Tensor | tuple) -> Tensor:
    """Megatron's layers return their bias beside the output; like DeepSpeed, leave it out."""
    return output[0] if isinstance(output, tuple) else output


class _Inner(nn.Module):
    """Gives the parameters DeepSpeed's names: deepspeed_moe.gate, deepspeed_moe.experts."""

    def __init__(self, gate: TopKGate, experts: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts


class MoE(nn.Module):
    """A mixture-of-experts layer; arguments, results and state_dict are those of deepspeed.moe.layer.MoE.

    Parameters
    ----------
    hidden_size
        D, of input and output.
    expert
        One expert; all of them begin as its copies. Two Linear layers around an activation, or three with a gate,
        run on the grouped kernels (whether they are that is tried out, on a probe); any other module runs too, one
        expert after the other.
    num_experts
        E.
    ep_size
        So many neighbouring ranks of torch.distributed hold all experts together, E / ep_size each; the layer is then
        called by all ranks, forward and backward, and divides them. ``state_dict`` has this rank's experts alone.
    k
        Experts per token.
    capacity_factor, eval_capacity_factor, min_capacity, drop_tokens
        How many tokens an expert takes, see above; with ``drop_tokens=False`` all that want it.
    use_residual
        ``expert`` itself also runs on every token, as an MLP beside the experts (PR-MoE).
    residual_mix
        "learned", DeepSpeed's: c_0 experts(x) + c_1 mlp(x), c = softmax(coefficient(x)). "sum", the paper's: their
        plain sum.
    noisy_gate_policy
        None, "Jitter" (the gate's input times 1 +- 0.01) or, for k = 1, "RSample"; in training.
    use_rts, top2_2nd_expert_sampling
        See above.
    use_tutel
        Has no effect: dispatch is a permutation anyway.
    enable_expert_tensor_parallelism
        Only False.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        residual_mix: str = "learned",
    ) -> None:
        super().__init__()
        _require(
            ep_size >= 1 and num_experts % ep_size == 0, "ep_size", ep_size, f"does not divide {num_experts} experts"
        )
        _require(not enable_expert_tensor_parallelism, "enable_expert_tensor_parallelism", True, "is not supported yet")
        _require(1 <= k <= num_experts, "k", k, f"is not in [1, num_experts ({num_experts})]")
        for name, value, allowed in (
            ("noisy_gate_policy", noisy_gate_policy, NOISE_POLICIES),
            ("residual_mix", residual_mix, RESIDUAL_MIXES),
        ):
            _require(value in allowed, name, value, f"is not one of {allowed}")
        for name, value in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            _require(0 <= value < math.inf, name, value, "is not 0 or a positive number")
        _require(min_capacity >= 0, "min_capacity", min_capacity, "is negative")
        self.use_residual = use_residual
        self.num_experts = num_experts
        self.num_local_experts = num_experts // ep_size
        self.ep_size = ep_size
        form = recognise(expert, hidden_size)
        if form is None:
            experts = LoopedDeepSpeedExperts(expert, self.num_local_experts)
        else:
            experts = GroupedDeepSpeedExperts(expert, form, self.num_local_experts)
        gate = TopKGate(
            hidden_size,
            num_experts,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            top2_2nd_expert_sampling,
        )
        self.deepspeed_moe = _Inner(gate, experts)
        self._mark_experts()
        self.register_load_state_dict_post_hook(_mark_loaded)
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2) if residual_mix == "learned" else None

    def _mark_experts(self) -> None:
        """As DeepSpeed marks what data parallelism treats apart."""
        for parameter in self.deepspeed_moe.experts.parameters():
            parameter.allreduce = False
            parameter.group_name = f"ep_size_{self.ep_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        super()._apply(fn, recurse)
        self._mark_experts()  # it may have made new parameters
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_experts()  # copies of parameters lose what is not theirs

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Parameters
        ----------
        hidden_states
            [..., D].
        used_token
            For k = 1, a mask of the tokens: those that are 0 go to no expert.

        Returns
        -------
        output
            [..., D].
        l_aux
            The balance loss, a scalar to add to the training loss times a factor.
        exp_counts
            [E] int64, how many choices each expert had before any was dropped.
        """
        x_TD = hidden_states.flatten(0, -2)
        expert_ids_TK, weights_TK, l_aux, exp_counts = self.deepspeed_moe.gate(x_TD, used_token)
        output = self._run_experts(x_TD, expert_ids_TK, weights_TK).view_as(hidden_states)
        if self.use_residual:
            output = self._with_residual(hidden_states, output)
        return output, l_aux, exp_counts

    def _run_experts(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        experts = self.deepspeed_moe.experts
        if self.ep_size == 1:
            return experts(x_TD, expert_ids_TK, weights_TK)
        group = world().expert_ranks(self.ep_size).together
        return run_experts_of_ranks(experts, self.num_experts, group, x_TD, expert_ids_TK, weights_TK)

    def logical_experts(self, part: int) -> list[tuple[nn.Parameter, str, int, int]]:
        """The experts' parameters with name, first row and rows in the layer of all ranks.

        Parameters
        ----------
        part
            Which of the ``ep_size`` parts of the experts this rank holds.
        """
        inner = self.deepspeed_moe.experts.logical_parameters(part * self.num_local_experts, self.num_experts)
        return [(p, f"deepspeed_moe.experts.{name}", first, rows) for p, name, first, rows in inner]

    def _with_residual(self, x: Tensor, routed: Tensor) -> Tensor:
        fixed = first_output(self.mlp(x))
        if self.coefficient is None:
            return routed + fixed
        mix = self.coefficient(x).softmax(-1)
        return routed * mix[..., :1] + fixed * mix[..., 1:]


def _mark_loaded(moe: MoE, _incompatible_keys: object) -> None:
    """After load_state_dict(assign=True) the parameters are those of the file."""
    moe._mark_experts()


def _require(condition: bool, name: str, value: object, what: str) -> None:
    if not condition:
        raise ValueError(f"[MoE] {name} ({value}) {what}")
