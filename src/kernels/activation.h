// Activation functions of the feed-forward blocks, by the names of Hugging Face's `hidden_act`.
#pragma once

#include <string_view>

namespace coterie {

// kClampedSwiglu is gpt-oss's gate, for gated blocks alone: with g = min(gate, 7) and u = clamp(up, -7, 7),
// g sigmoid(1.702 g) (u + 1).
enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu, kClampedSwiglu };
inline constexpr float kSwigluAlpha = 1.702f, kSwigluLimit = 7.0f;

// "relu", "gelu" (exact, by erf), "gelu_new" and "gelu_pytorch_tanh" (tanh form), "silu" ("swish"), "clamped_swiglu".
// InvalidArgument for another name.
Activation activation_from_name(std::string_view name);
std::string_view activation_name(Activation activation);

}  // namespace coterie
