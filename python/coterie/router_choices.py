"""What the words of a router's and a layer's settings may be, for configuration files and for coterie.torch alike.

The numbers' rules stand where the settings are checked: RouterConfig::validate in src/moe/router_config.cc for all that
runs, and before that in config.py and coterie.torch.moe, whose messages name the key or the argument.
"""

RESIDUALS = ("none", "sum", "learned", "shared_gate")

ROUTER_CHOICES = {
    "score_function": ("softmax", "sigmoid"),
    "chooser": ("tokens", "experts"),
    "group_score": ("max", "top2"),
    "normalize_over": ("chosen", "kept"),
    "choice_noise": ("none", "rsample", "second_expert"),
    "drop_policy": ("random", "position", "probability"),
}

MOST_EXPERTS_THAT_CHOOSE = 256  # kMostChoices in src/moe/combine.h
