// Activation functions of the feed-forward blocks, by the names of Hugging Face's `hidden_act`.
#pragma once

#include <string_view>

namespace coterie {

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// "relu", "gelu" (exact, by erf), "gelu_new" and "gelu_pytorch_tanh" (tanh form), "silu" ("swish").
// InvalidArgument for another name.
Activation activation_from_name(std::string_view name);
std::string_view activation_name(Activation activation);

}  // namespace coterie
