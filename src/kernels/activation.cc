#include "kernels/activation.h"

#include <string>

#include "coterie/error.h"

namespace coterie {
namespace {

struct Entry {
  std::string_view name;
  Activation activation;
};
// The first name of an activation is the one that is written.
constexpr Entry kEntries[] = {
    {"none", Activation::kNone},         {"relu", Activation::kRelu},
    {"gelu", Activation::kGelu},         {"gelu_pytorch_tanh", Activation::kGeluTanh},
    {"gelu_new", Activation::kGeluTanh}, {"silu", Activation::kSilu},
    {"swish", Activation::kSilu},        {"clamped_swiglu", Activation::kClampedSwiglu},
};

}  // namespace

Activation activation_from_name(std::string_view name) {
  for (const Entry& entry : kEntries) {
    if (entry.name == name && entry.activation != Activation::kNone) return entry.activation;
  }
  throw InvalidArgument("activation: '" + std::string(name) +
                        "' is not one of relu, gelu, gelu_new, gelu_pytorch_tanh, silu, swish, clamped_swiglu");
}

std::string_view activation_name(Activation activation) {
  for (const Entry& entry : kEntries) {
    if (entry.activation == activation) return entry.name;
  }
  return "none";
}

}  // namespace coterie
