// In which type a model's matrices are kept. Norms, biases, the router and the residual mix are always fp32: they are
// small and decide much.
#pragma once

#include <string>
#include <string_view>

#include "kernels/panels.h"

namespace coterie {

struct WeightTypes {
  PanelType experts = PanelType::kF32;    // and MLPs
  PanelType attention = PanelType::kF32;  // projections
  PanelType head = PanelType::kF32;       // and embedding, one matrix where they are tied

  // Of a KV cache that is not in few bits.
  DType dtype() const { return experts == PanelType::kF32 ? DType::kF32 : DType::kBF16; }
  // "int4", or "int4, attention int8, head int8" where they differ.
  std::string description() const;
};

// The type that a logical tensor (tensors.h) is rounded to: a matrix of experts, MLPs, attention, the head or the
// embedding. kF32 for everything else, which is not rounded; also for kv_b_proj of latent attention, which is only cut
// up and turned when it is loaded, and then rounded.
PanelType type_of_tensor(const WeightTypes& types, const std::string& name);

// "fp32", "bf16", "int8", "int8a16", "int4" (groups of 32), "int4_64" (groups of 64), "mxfp4"; see panels.h.
std::string_view panel_type_name(PanelType type);

// All of dtype, except where another is named for attention or head (""), the head int8a16 where dtype is quantized,
// and attention, too, where it is int8. InvalidArgument "dtype: 'int5' is not one of fp32, bf16, int8, int8a16, int4,
// int4_64".
WeightTypes weight_types(const std::string& dtype, const std::string& attention_dtype = "",
                         const std::string& head_dtype = "");

}  // namespace coterie
