// CoterieForCausalLM, our own format: says everything that a ModelConfig holds (keys in config.h).
#include <array>
#include <utility>

#include "coterie/error.h"
#include "model/architectures.h"
#include "model/rope_json.h"
#include "model/router_json.h"

namespace coterie {
namespace {

template <typename Enum, size_t N>
using Names = std::array<std::pair<const char*, Enum>, N>;

constexpr Names<NormKind, 2> kNorms = {{{"rms_norm", NormKind::kRmsNorm}, {"layer_norm", NormKind::kLayerNorm}}};
constexpr Names<PositionKind, 2> kPositions = {{{"rope", PositionKind::kRope}, {"learned", PositionKind::kLearned}}};
constexpr Names<QkNorm, 3> kQkNorms = {{{"none", QkNorm::kNone}, {"head", QkNorm::kHead}, {"full", QkNorm::kFull}}};
constexpr Names<ResidualKind, 4> kResiduals = {{{"none", ResidualKind::kNone},
                                                {"sum", ResidualKind::kSum},
                                                {"learned", ResidualKind::kLearned},
                                                {"shared_gate", ResidualKind::kSharedGate}}};
constexpr Names<ScoreFunction, 3> kScores = {{{"softmax", ScoreFunction::kSoftmax},
                                              {"sigmoid", ScoreFunction::kSigmoid},
                                              {"sparsemixer", ScoreFunction::kSparsemixer}}};
constexpr Names<Chooser, 2> kChoosers = {{{"tokens", Chooser::kTokens}, {"experts", Chooser::kExperts}}};
constexpr Names<GroupScore, 2> kGroupScores = {{{"max", GroupScore::kMax}, {"top2", GroupScore::kTopTwo}}};
constexpr Names<NormalizeOver, 2> kNormalizeOver = {
    {{"chosen", NormalizeOver::kChosen}, {"kept", NormalizeOver::kKept}}};
constexpr Names<ChoiceNoise, 3> kNoises = {
    {{"none", ChoiceNoise::kNone}, {"rsample", ChoiceNoise::kRSample}, {"second_expert", ChoiceNoise::kSecondExpert}}};
constexpr Names<DropPolicy, 3> kDropPolicies = {
    {{"random", DropPolicy::kRandom}, {"position", DropPolicy::kPosition}, {"probability", DropPolicy::kProbability}}};

template <typename Enum, size_t N>
Enum read_enum(const ConfigReader& json, const std::string& key, const Names<Enum, N>& names) {
  const std::string text = json.text(key, names[0].first);
  std::string known;
  for (const auto& [name, value] : names) {
    if (text == name) return value;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  json.fail(key, "'" + text + "' is not one of " + known);
}

float read_float(const ConfigReader& json, const std::string& key, float fallback) {
  return static_cast<float>(json.number(key, fallback));
}

template <typename Enum, size_t N>
const char* enum_name(Enum value, const Names<Enum, N>& names) {
  for (const auto& [name, candidate] : names) {
    if (candidate == value) return name;
  }
  return "";
}

// Everything of a router but its sizes, which the layer gives.
void read_router(const ConfigReader& json, RouterConfig& router) {
  router.score_function = read_enum(json, "score_function", kScores);
  router.sparsemixer_epsilon = read_float(json, "sparsemixer_epsilon", router.sparsemixer_epsilon);
  router.logit_bias = json.boolean("logit_bias", router.logit_bias);
  router.chooser = read_enum(json, "chooser", kChoosers);
  router.num_groups = json.integer("num_groups", router.num_groups);
  router.top_k_groups = json.integer("top_k_groups", router.top_k_groups);
  router.group_score = read_enum(json, "group_score", kGroupScores);
  router.choice_bias = json.boolean("choice_bias", router.choice_bias);
  router.normalize = json.boolean("normalize", router.normalize);
  router.normalize_over = read_enum(json, "normalize_over", kNormalizeOver);
  router.routed_scaling = read_float(json, "routed_scaling", router.routed_scaling);
  router.choice_noise = read_enum(json, "choice_noise", kNoises);
  router.jitter = read_float(json, "jitter", router.jitter);
  router.capacity_factor = json.number("capacity_factor", router.capacity_factor);
  router.eval_capacity_factor = json.number("eval_capacity_factor", router.eval_capacity_factor);
  router.min_capacity = json.integer("min_capacity", router.min_capacity);
  router.drop_policy = read_enum(json, "drop_policy", kDropPolicies);
  json.refuse_unknown();
}

LayerConfig read_layer(const ConfigReader& json) {
  LayerConfig layer;
  layer.window = json.integer("window", 0);
  layer.router.num_experts = json.integer("num_experts", 0);
  layer.intermediate_size = json.integer("intermediate_size", 0);
  if (!layer.is_moe()) {
    json.refuse_unknown("unknown key of a dense layer");
    return layer;
  }
  layer.router.top_k = json.integer("top_k", 1);
  layer.expert_intermediate_size = json.integer("expert_intermediate_size");
  layer.residual = read_enum(json, "residual", kResiduals);
  if (json.has("router")) read_router(json.object("router"), layer.router);
  json.refuse_unknown();
  return layer;
}

LatentAttention read_latent(const ConfigReader& json) {
  LatentAttention latent = {.kv_rank = json.integer("kv_lora_rank"),
                            .q_rank = json.integer("q_lora_rank", 0),
                            .nope_dim = json.integer("qk_nope_head_dim"),
                            .rope_dim = json.integer("qk_rope_head_dim"),
                            .v_dim = json.integer("v_head_dim")};
  latent.norm_eps = read_float(json, "norm_eps", latent.norm_eps);
  if (latent.kv_rank < 1) json.fail("kv_lora_rank", std::to_string(latent.kv_rank) + " is below 1");
  json.refuse_unknown();
  return latent;
}

void read_attention(const ConfigReader& json, ModelConfig& c) {
  c.positions = read_enum(json, "position_embedding_type", kPositions);
  c.rope_theta = json.number("rope_theta", c.rope_theta);
  if (json.has("rope_scaling")) {
    const ConfigReader rope = json.object("rope_scaling");
    c.rope_scaling = read_rope_scaling(rope, rope.text("rope_type"), c.max_position_embeddings);
    rope.refuse_unknown();
  }
  c.rotary_dim = json.integer("rotary_dim", 0);
  c.rope_interleaved = json.boolean("rope_interleaved", false);
  if (json.has("latent_attention")) c.latent = read_latent(json.object("latent_attention"));
  c.attention_sinks = json.boolean("attention_sinks", false);
  c.qk_norm = read_enum(json, "qk_norm", kQkNorms);
  c.clip_qkv = read_float(json, "clip_qkv", c.clip_qkv);
  c.attention_multiplier = read_float(json, "attention_multiplier", c.attention_multiplier);
  c.attention_bias = json.boolean("attention_bias", c.attention_bias);
  c.attention_output_bias = json.boolean("attention_output_bias", c.attention_output_bias);
}

// Keys that transformers writes into every config.json and that change no result of a causal model.
constexpr const char* kBystanders[] = {"architectures",
                                       "model_type",
                                       "dtype",
                                       "torch_dtype",
                                       "transformers_version",
                                       "use_cache",
                                       "pad_token_id",
                                       "_name_or_path",
                                       "return_dict",
                                       "output_hidden_states",
                                       "output_attentions",
                                       "is_encoder_decoder",
                                       "id2label",
                                       "label2id",
                                       "problem_type",
                                       "chunk_size_feed_forward",
                                       "balance_loss_coef",
                                       "z_loss_coef",
                                       "auto_map",
                                       "_attn_implementation_autoset"};

ModelConfig read_config(const ConfigReader& json) {
  ModelConfig c;
  c.vocab_size = json.integer("vocab_size");
  c.hidden_size = json.integer("hidden_size");
  c.num_heads = json.integer("num_attention_heads");
  if (c.num_heads < 1) json.fail("num_attention_heads", std::to_string(c.num_heads) + " is below 1");
  c.num_kv_heads = json.integer("num_key_value_heads", c.num_heads);
  c.head_dim = json.integer("head_dim", c.hidden_size / c.num_heads);
  if (!json.has("head_dim") && c.hidden_size % c.num_heads != 0) {
    json.fail("num_attention_heads", std::to_string(c.num_heads) + " does not divide hidden_size (" +
                                         std::to_string(c.hidden_size) + ") and head_dim is not given");
  }
  c.max_position_embeddings = json.integer("max_position_embeddings");
  c.norm = read_enum(json, "norm_type", kNorms);
  c.norm_eps = read_float(json, "norm_eps", c.norm_eps);
  read_attention(json, c);
  c.activation = read_activation(json, "hidden_act", "silu");
  c.gated_mlp = json.boolean("gated_mlp", c.gated_mlp);
  c.mlp_bias = json.boolean("mlp_bias", c.mlp_bias);
  c.lm_head_bias = json.boolean("lm_head_bias", c.lm_head_bias);
  c.embedding_multiplier = read_float(json, "embedding_multiplier", c.embedding_multiplier);
  c.residual_multiplier = read_float(json, "residual_multiplier", c.residual_multiplier);
  c.logits_scaling = read_float(json, "logits_scaling", c.logits_scaling);
  c.tie_word_embeddings = json.boolean("tie_word_embeddings", c.tie_word_embeddings);
  c.initializer_range = static_cast<float>(json.number("initializer_range", c.initializer_range));
  c.bos_token_id = json.integer("bos_token_id", -1);
  c.eos_token_ids = read_token_ids(json, "eos_token_id");

  const nlohmann::json& layers = json.value("layers");
  if (!layers.is_array()) json.fail("layers", "not a list");
  const auto num_layers = static_cast<int64_t>(layers.size());
  if (num_layers > 0 && read_num_layers(json, "num_hidden_layers", num_layers) != num_layers) {
    json.fail("num_hidden_layers",
              json.value("num_hidden_layers").dump() + ", but layers lists " + std::to_string(num_layers));
  }
  for (int64_t n = 0; n < num_layers; ++n) {
    c.layers.push_back(read_layer(ConfigReader(layers[n], json.source(), "layers[" + std::to_string(n) + "].")));
  }
  refuse_quantization(json, "coterie");
  for (const char* key : kBystanders) json.ignore(key);
  json.refuse_unknown();
  return c;
}

Json router_json(const RouterConfig& router) {
  Json json = {{"score_function", enum_name(router.score_function, kScores)},
               {"chooser", enum_name(router.chooser, kChoosers)},
               {"num_groups", router.num_groups},
               {"top_k_groups", router.top_k_groups},
               {"group_score", enum_name(router.group_score, kGroupScores)},
               {"choice_bias", router.choice_bias},
               {"normalize", router.normalize},
               {"normalize_over", enum_name(router.normalize_over, kNormalizeOver)},
               {"routed_scaling", shortest_decimal(router.routed_scaling)},
               {"choice_noise", enum_name(router.choice_noise, kNoises)},
               {"jitter", shortest_decimal(router.jitter)},
               {"capacity_factor", router.capacity_factor},
               {"eval_capacity_factor", router.eval_capacity_factor},
               {"min_capacity", router.min_capacity},
               {"drop_policy", enum_name(router.drop_policy, kDropPolicies)}};
  if (router.logit_bias) json["logit_bias"] = true;
  if (router.score_function == ScoreFunction::kSparsemixer) {
    json["sparsemixer_epsilon"] = shortest_decimal(router.sparsemixer_epsilon);
  }
  return json;
}

Json layer_json(const LayerConfig& layer) {
  Json json = {{"num_experts", layer.router.num_experts}};
  if (layer.window != 0) json["window"] = layer.window;
  if (!layer.is_moe()) {
    json["intermediate_size"] = layer.intermediate_size;
    return json;
  }
  json["top_k"] = layer.router.top_k;
  json["expert_intermediate_size"] = layer.expert_intermediate_size;
  json["residual"] = enum_name(layer.residual, kResiduals);
  if (layer.residual != ResidualKind::kNone) json["intermediate_size"] = layer.intermediate_size;
  json["router"] = router_json(layer.router);
  return json;
}

Json latent_json(const LatentAttention& latent) {
  return {{"kv_lora_rank", latent.kv_rank},      {"q_lora_rank", latent.q_rank},
          {"qk_nope_head_dim", latent.nope_dim}, {"qk_rope_head_dim", latent.rope_dim},
          {"v_head_dim", latent.v_dim},          {"norm_eps", shortest_decimal(latent.norm_eps)}};
}

// What most models do without is left out.
void write_specialties(const ModelConfig& c, Json& json) {
  if (c.rope_scaling.kind != RopeScalingKind::kNone) json["rope_scaling"] = rope_scaling_json(c.rope_scaling);
  if (c.rotary_dim != 0) json["rotary_dim"] = c.rotary_dim;
  if (c.rope_interleaved) json["rope_interleaved"] = true;
  if (c.is_latent()) json["latent_attention"] = latent_json(c.latent);
  if (c.attention_sinks) json["attention_sinks"] = true;
  if (c.lm_head_bias) json["lm_head_bias"] = true;
  if (c.attention_multiplier != 0) json["attention_multiplier"] = shortest_decimal(c.attention_multiplier);
  if (c.embedding_multiplier != 1) json["embedding_multiplier"] = shortest_decimal(c.embedding_multiplier);
  if (c.residual_multiplier != 1) json["residual_multiplier"] = shortest_decimal(c.residual_multiplier);
  if (c.logits_scaling != 1) json["logits_scaling"] = shortest_decimal(c.logits_scaling);
}

Json write_config(const ModelConfig& c) {
  Json json = {{"architectures", Json::array({"CoterieForCausalLM"})},
               {"model_type", "coterie"},
               {"vocab_size", c.vocab_size},
               {"hidden_size", c.hidden_size},
               {"num_hidden_layers", c.num_layers()},
               {"num_attention_heads", c.num_heads},
               {"num_key_value_heads", c.num_kv_heads},
               {"head_dim", c.head_dim},
               {"max_position_embeddings", c.max_position_embeddings},
               {"norm_type", enum_name(c.norm, kNorms)},
               {"norm_eps", shortest_decimal(c.norm_eps)},
               {"position_embedding_type", enum_name(c.positions, kPositions)},
               {"rope_theta", c.rope_theta},
               {"qk_norm", enum_name(c.qk_norm, kQkNorms)},
               {"clip_qkv", shortest_decimal(c.clip_qkv)},
               {"hidden_act", activation_name(c.activation)},
               {"gated_mlp", c.gated_mlp},
               {"attention_bias", c.attention_bias},
               {"attention_output_bias", c.attention_output_bias},
               {"mlp_bias", c.mlp_bias},
               {"tie_word_embeddings", c.tie_word_embeddings},
               {"initializer_range", shortest_decimal(c.initializer_range)},
               {"bos_token_id", optional_id_json(c.bos_token_id)},
               {"eos_token_id", token_ids_json(c.eos_token_ids)}};
  write_specialties(c, json);
  json["layers"] = Json::array();
  for (const LayerConfig& layer : c.layers) json["layers"].push_back(layer_json(layer));
  return json;
}

// Our files store the logical tensors as they are, or in MXFP4.
CheckpointMap checkpoint_map(const ModelConfig& config) {
  return map_tensors(config, [](const LogicalName&, const TensorSpec& spec) {
    return std::vector<std::vector<Piece>>{{whole_piece(spec, spec.name)}, {whole_piece(spec, spec.name + "_blocks")}};
  });
}

}  // namespace

RouterConfig router_from_json(const std::string& text) {
  const nlohmann::json object = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) throw InvalidArgument("[router] " + text + ": not an object of JSON");
  const ConfigReader json(object, "[router]");
  RouterConfig router;
  router.num_experts = json.integer("num_experts");
  router.top_k = json.integer("top_k", 1);
  read_router(json, router);
  router.validate();
  return router;
}

std::string router_to_json(const RouterConfig& config) {
  Json json = router_json(config);
  json["num_experts"] = config.num_experts;
  json["top_k"] = config.top_k;
  return json.dump();
}

const Architecture kCoterieArchitecture = {"CoterieForCausalLM", "coterie", read_config, write_config, checkpoint_map};

}  // namespace coterie
