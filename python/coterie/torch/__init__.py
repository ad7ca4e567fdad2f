"""Coterie for PyTorch users.

Modules and functions that run on our kernels on the CPU, and through ATen ops of the same meaning elsewhere.

Importing this package also registers, where Hugging Face transformers 5 is installed, ``CoterieForCausalLM``, so
that ``AutoModelForCausalLM.from_pretrained`` opens what ``coterie export`` writes, and
``experts_implementation="coterie"``, with which the MoE models of transformers run on our kernels.
"""

from importlib import import_module
from importlib.util import find_spec

from coterie.torch import accelerator
from coterie.torch.engine import Engine, add_config_arguments, initialize
from coterie.torch.functional import (
    aten_ops,
    cross_entropy,
    experts,
    linear,
    packed_weight_bytes,
    packed_weights,
    route,
)
from coterie.torch.layers import GroupedExperts, Linear, Router
from coterie.torch.moe import Experts, LayerConfig, Load, RouterConfig, RouterDraws, Routing
from coterie.torch.moe.layer import MoE
from coterie.torch.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from coterie.torch.ranks import init_distributed

__all__ = [
    "Engine",
    "Experts",
    "GroupedExperts",
    "LayerConfig",
    "Linear",
    "Load",
    "MoE",
    "Router",
    "RouterConfig",
    "RouterDraws",
    "Routing",
    "accelerator",
    "add_config_arguments",
    "aten_ops",
    "cross_entropy",
    "experts",
    "init_distributed",
    "initialize",
    "is_moe_param",
    "linear",
    "packed_weight_bytes",
    "packed_weights",
    "route",
    "split_params_into_different_moe_groups_for_optimizer",
]

_transformers = import_module("transformers") if find_spec("transformers") is not None else None
if _transformers is not None and int(_transformers.__version__.split(".")[0]) >= 5:
    from transformers import AutoConfig, AutoModelForCausalLM

    import coterie.torch.transformers_experts  # noqa: F401  registers experts_implementation="coterie"
    from coterie.torch.configuration import CoterieConfig
    from coterie.torch.modeling import CoterieForCausalLM

    AutoConfig.register(CoterieConfig.model_type, CoterieConfig, exist_ok=True)
    AutoModelForCausalLM.register(CoterieConfig, CoterieForCausalLM, exist_ok=True)
    __all__ += ["CoterieConfig", "CoterieForCausalLM"]
