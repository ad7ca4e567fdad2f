#include "model/weight_types.h"

#include "coterie/error.h"
#include "io/printable.h"
#include "model/checkpoint_map.h"

namespace coterie {
namespace {

constexpr std::string_view kNames[kPanelTypes] = {"fp32", "bf16", "int8", "int8a16", "int4", "int4_64", "mxfp4"};

PanelType type_from_name(const std::string& field, const std::string& name) {
  std::string known;
  for (int i = 0; i < kPanelTypes; ++i) {
    const auto type = static_cast<PanelType>(i);
    if (type == PanelType::kMxfp4) continue;  // what files bring, never what weights are rounded to
    if (name == kNames[i]) return type;
    known += (known.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  throw InvalidArgument(field + ": " + printable(name) + " is not one of " + known);
}

}  // namespace

std::string_view panel_type_name(PanelType type) { return kNames[index_of(type)]; }

PanelType type_of_tensor(const WeightTypes& types, const std::string& name) {
  const LogicalName logical(name);
  const std::string& module = logical.module;
  if (logical.kind != "weight") return PanelType::kF32;
  if (module == "lm_head" || module == "model.embed_tokens") return types.head;
  if (module.starts_with("mlp.") || module.starts_with("experts.")) return types.experts;
  const bool projection = module.starts_with("attention.") && module.ends_with("_proj");
  return projection && module != "attention.kv_b_proj" ? types.attention : PanelType::kF32;
}

std::string WeightTypes::description() const {
  std::string text(panel_type_name(experts));
  if (attention != experts) text += ", attention " + std::string(panel_type_name(attention));
  if (head != experts) text += ", head " + std::string(panel_type_name(head));
  return text;
}

WeightTypes weight_types(const std::string& dtype, const std::string& attention_dtype, const std::string& head_dtype) {
  const PanelType type = type_from_name("dtype", dtype);
  // What the head rounds, it rounds in every token's logits: activations in 16 bits cost it nothing, since its weights
  // are what it waits for.
  const PanelType head = is_quantized(type) ? PanelType::kInt8A16 : type;
  // Weights in int8 are nearly exact; what int8 costs is its activations, in groups of 64. Half of that is attention's,
  // which is the smaller part of the work.
  const PanelType attention = type == PanelType::kInt8 ? PanelType::kInt8A16 : type;
  return {.experts = type,
          .attention = attention_dtype.empty() ? attention : type_from_name("attention_dtype", attention_dtype),
          .head = head_dtype.empty() ? head : type_from_name("head_dtype", head_dtype)};
}

}  // namespace coterie
