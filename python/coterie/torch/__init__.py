"""Coterie for PyTorch users.

Importing this package registers ``CoterieForCausalLM`` with Hugging Face transformers where that is
installed, so that ``AutoModelForCausalLM.from_pretrained`` opens what ``coterie export`` writes.
"""

from importlib.util import find_spec

from coterie.torch.moe import Experts, LayerConfig, Router, RouterConfig, RouterDraws, Routing

__all__ = ["Experts", "LayerConfig", "Router", "RouterConfig", "RouterDraws", "Routing"]

if find_spec("transformers") is not None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from coterie.torch.configuration import CoterieConfig
    from coterie.torch.modeling import CoterieForCausalLM

    AutoConfig.register(CoterieConfig.model_type, CoterieConfig, exist_ok=True)
    AutoModelForCausalLM.register(CoterieConfig, CoterieForCausalLM, exist_ok=True)
    __all__ += ["CoterieConfig", "CoterieForCausalLM"]
