#include "model/rope_json.h"

#include <algorithm>
#include <cmath>

namespace coterie {
namespace {

constexpr std::pair<const char*, RopeScalingKind> kTypes[] = {
    {"default", RopeScalingKind::kNone},    {"linear", RopeScalingKind::kLinear},
    {"dynamic", RopeScalingKind::kDynamic}, {"llama3", RopeScalingKind::kLlama3},
    {"yarn", RopeScalingKind::kYarn},       {"longrope", RopeScalingKind::kLongrope},
    {"factors", RopeScalingKind::kFactors}};

const char* type_key(const ConfigReader& rope) { return rope.has("rope_type") ? "rope_type" : "type"; }

RopeScalingKind kind_of(const ConfigReader& rope, const std::string& type) {
  for (const auto& [name, kind] : kTypes) {
    if (type == name) return kind;  // "factors" is of our own files alone
  }
  rope.fail(type_key(rope),
            "'" + type + "' is not supported (supported: default, linear, dynamic, llama3, yarn, longrope)");
}

const char* name_of(RopeScalingKind kind) {
  for (const auto& [name, candidate] : kTypes) {
    if (candidate == kind) return name;
  }
  return "";
}

void set_partial(const ConfigReader& json, double factor, const RopeDefaults& defaults, int64_t head_dim,
                 ModelConfig& config) {
  if (factor == 1.0) return;
  if (!defaults.partial_rotary_factor) {
    json.fail("partial_rotary_factor", Json(factor).dump() + " is not supported (only 1.0)");
  }
  config.rotary_dim = static_cast<int64_t>(static_cast<double>(head_dim) * factor);
  if (!(factor > 0 && factor < 1) || config.rotary_dim < 2) {
    json.fail("partial_rotary_factor", Json(factor).dump() + " of a head of " + std::to_string(head_dim));
  }
}

void read_yarn(const ConfigReader& rope, RopeScaling& s) {
  s.beta_fast = rope.number("beta_fast", s.beta_fast);
  s.beta_slow = rope.number("beta_slow", s.beta_slow);
  s.truncate = rope.boolean("truncate", s.truncate);
  s.attention_factor = rope.number("attention_factor", 0.0);
  s.mscale = rope.number("mscale", 0.0);
  s.mscale_all_dim = rope.number("mscale_all_dim", 0.0);
  for (const auto& [key, value] : {std::pair("beta_fast", s.beta_fast), std::pair("beta_slow", s.beta_slow)}) {
    if (value <= 0) rope.fail(key, Json(value).dump() + " is not positive");
  }
  for (const auto& [key, value] : {std::pair("attention_factor", s.attention_factor), std::pair("mscale", s.mscale),
                                   std::pair("mscale_all_dim", s.mscale_all_dim)}) {
    if (value < 0) rope.fail(key, Json(value).dump() + " is negative");
  }
}

void read_longrope(const ConfigReader& rope, RopeScaling& s) {
  rope.value("short_factor");  // both must be there
  rope.value("long_factor");
  s.short_factors = rope.numbers("short_factor");
  s.long_factors = rope.numbers("long_factor");
  s.attention_factor = rope.number("attention_factor", 0.0);
  if (s.attention_factor < 0) rope.fail("attention_factor", Json(s.attention_factor).dump() + " is negative");
  for (const auto& [key, mscale] : {std::pair("short_mscale", &s.short_mscale), {"long_mscale", &s.long_mscale}}) {
    *mscale = rope.number(key, 0.0);
    if (rope.has(key) && *mscale <= 0) rope.fail(key, Json(*mscale).dump() + " is not positive");
  }
  if (s.original_context < 2) {  // attention factors divide by its logarithm
    rope.fail("original_max_position_embeddings", std::to_string(s.original_context) + " is below 2");
  }
}

// What a file of an architecture may say besides, and how many factors it must have.
void check_longrope(const ConfigReader& rope, const RopeDefaults& defaults, int64_t num_dims, const RopeScaling& s) {
  for (const auto& [key, factors] : {std::pair("short_factor", &s.short_factors), {"long_factor", &s.long_factors}}) {
    if (static_cast<int64_t>(factors->size()) == num_dims / 2) continue;
    rope.fail(key, std::to_string(factors->size()) + " numbers, not " + std::to_string(num_dims / 2) +
                       ", one for each pair of dimensions that turns");
  }
  for (const char* key : {"short_mscale", "long_mscale"}) {
    if (defaults.longrope_mscales) {
      rope.value(key);
    } else if (rope.has(key)) {
      rope.fail(key, "not supported (" + rope.value(key).dump() + ")");
    }
  }
}

void read_llama3(const ConfigReader& rope, RopeScaling& s) {
  rope.value("low_freq_factor");  // both must be there
  rope.value("high_freq_factor");
  s.low_freq_factor = rope.number("low_freq_factor", 0);
  s.high_freq_factor = rope.number("high_freq_factor", 0);
  if (s.low_freq_factor <= 0) rope.fail("low_freq_factor", Json(s.low_freq_factor).dump() + " is not positive");
  if (s.high_freq_factor <= s.low_freq_factor) {
    rope.fail("high_freq_factor", Json(s.high_freq_factor).dump() + " is not above low_freq_factor (" +
                                      Json(s.low_freq_factor).dump() + ")");
  }
}

bool has_original_context(RopeScalingKind kind) {
  return kind == RopeScalingKind::kLlama3 || kind == RopeScalingKind::kYarn || kind == RopeScalingKind::kLongrope;
}

void read_original_context(const ConfigReader& rope, int64_t max_positions, std::optional<int64_t> outside,
                           RopeScaling& s) {
  const std::string key = "original_max_position_embeddings";
  const int64_t inside = rope.integer(key, max_positions);
  s.original_context = has_original_context(s.kind) ? outside.value_or(inside) : inside;
  if (s.original_context < 1) rope.fail(key, std::to_string(s.original_context) + " is below 1");
  // transformers looks at max_position_embeddings alone
  if (!has_original_context(s.kind) && s.original_context != max_positions) {
    rope.fail(key, std::to_string(s.original_context) + " is not " + std::to_string(max_positions) +
                       ", max_position_embeddings");
  }
}

// The ratio of the two contexts where a file of yarn says null, or one of longrope nothing.
void read_factor(const ConfigReader& rope, int64_t max_positions, RopeScaling& s) {
  const bool is_longrope = s.kind == RopeScalingKind::kLongrope;
  const bool may_be_null = s.kind == RopeScalingKind::kYarn && rope.present("factor");
  if (!may_be_null && !is_longrope) rope.value("factor");
  const double ratio =
      static_cast<double>(max_positions) / static_cast<double>(std::max<int64_t>(s.original_context, 1));
  s.factor = rope.number("factor", is_longrope ? std::max(ratio, 1.0) : ratio);
  if (s.factor < 1.0) rope.fail("factor", Json(s.factor).dump() + " is below 1");
}

}  // namespace

RopeScaling read_rope_scaling(const ConfigReader& rope, const std::string& type, int64_t max_positions,
                              std::optional<int64_t> original_outside) {
  RopeScaling s;
  s.kind = kind_of(rope, type);
  rope.ignore("rope_type");
  rope.ignore("type");
  if (s.kind == RopeScalingKind::kNone) return s;
  if (s.kind == RopeScalingKind::kFactors) {
    s.factors = rope.numbers("factors");
    return s;
  }
  if (s.kind != RopeScalingKind::kLinear) read_original_context(rope, max_positions, original_outside, s);
  read_factor(rope, max_positions, s);
  if (s.kind == RopeScalingKind::kLlama3) read_llama3(rope, s);
  if (s.kind == RopeScalingKind::kYarn) read_yarn(rope, s);
  if (s.kind == RopeScalingKind::kLongrope) read_longrope(rope, s);
  return s;
}

void read_rope(const ConfigReader& json, const RopeDefaults& defaults, int64_t head_dim, ModelConfig& config) {
  config.rope_theta = json.number("rope_theta", defaults.theta);
  double partial = json.number("partial_rotary_factor", defaults.partial_rotary_factor.value_or(1.0));
  // Where both are there, transformers takes this one as well.
  const char* key =
      json.has("rope_scaling") && !json.value("rope_scaling").empty() ? "rope_scaling" : "rope_parameters";
  json.ignore("rope_scaling");
  json.ignore("rope_parameters");
  if (!json.has(key) || json.value(key).empty()) return set_partial(json, partial, defaults, head_dim, config);
  const ConfigReader rope = json.object(key);
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (defaults.longrope_mscales && type != "default" && type != "longrope") {
    rope.fail(type_key(rope), "'" + type + "' is not supported in this architecture (supported: default, longrope)");
  }
  std::optional<int64_t> outside;  // where the original context is there, it counts
  const char* original = "original_max_position_embeddings";
  if (json.has(original)) outside = json.integer(original);
  config.rope_scaling = read_rope_scaling(rope, type, config.max_position_embeddings, outside);
  config.rope_theta = rope.number("rope_theta", config.rope_theta);
  partial = rope.number("partial_rotary_factor", partial);
  set_partial(rope, partial, defaults, head_dim, config);
  if (config.rope_scaling.kind == RopeScalingKind::kLongrope) {
    check_longrope(rope, defaults, config.rotary_dim != 0 ? config.rotary_dim : head_dim, config.rope_scaling);
  }
  rope.refuse_unknown("not supported");
}

Json rope_scaling_json(const RopeScaling& s) {
  Json json = {{"rope_type", name_of(s.kind)}};
  if (s.kind == RopeScalingKind::kNone) return json;
  if (s.kind == RopeScalingKind::kFactors) {
    json["factors"] = s.factors;
    return json;
  }
  json["factor"] = s.factor;
  if (has_original_context(s.kind)) json["original_max_position_embeddings"] = s.original_context;
  if (s.kind == RopeScalingKind::kLlama3) {
    json["low_freq_factor"] = s.low_freq_factor;
    json["high_freq_factor"] = s.high_freq_factor;
  }
  if (s.kind == RopeScalingKind::kYarn) {
    json["beta_fast"] = s.beta_fast;
    json["beta_slow"] = s.beta_slow;
    json["truncate"] = s.truncate;
    if (s.attention_factor != 0) json["attention_factor"] = s.attention_factor;
    if (s.mscale != 0) json["mscale"] = s.mscale;
    if (s.mscale_all_dim != 0) json["mscale_all_dim"] = s.mscale_all_dim;
  }
  if (s.kind == RopeScalingKind::kLongrope) {
    json["short_factor"] = s.short_factors;
    json["long_factor"] = s.long_factors;
    if (s.attention_factor != 0) json["attention_factor"] = s.attention_factor;
    if (s.short_mscale != 0) json["short_mscale"] = s.short_mscale;
    if (s.long_mscale != 0) json["long_mscale"] = s.long_mscale;
  }
  return json;
}

void write_rope(const ModelConfig& config, int64_t head_dim, bool partial, Json& json) {
  json["rope_theta"] = config.rope_theta;
  Json rope = rope_scaling_json(config.rope_scaling);
  rope["rope_theta"] = config.rope_theta;
  if (partial) {
    double factor =
        config.rotary_dim == 0 ? 1.0 : static_cast<double>(config.rotary_dim) / static_cast<double>(head_dim);
    // Readers round the product down.
    while (static_cast<int64_t>(factor * static_cast<double>(head_dim)) < config.rotary_dim) {
      factor = std::nextafter(factor, 2.0);
    }
    json["partial_rotary_factor"] = rope["partial_rotary_factor"] = factor;
  }
  json["rope_parameters"] = rope;
}

}  // namespace coterie
