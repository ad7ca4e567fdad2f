#include "model/config.h"

#include <gtest/gtest.h>

#include <cmath>

#include "coterie/error.h"
#include "io/test_files.h"
#include "model/tensors.h"

namespace coterie {
namespace {

std::string refusal(const std::string& json) {
  try {
    ModelConfig::from_json(json, "config.json");
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "accepted";
}

std::string ours(const std::string& layers, const std::string& extra = "") {
  return R"({"architectures": ["CoterieForCausalLM"], "vocab_size": 50, "hidden_size": 12, "num_attention_heads": 3,
             "max_position_embeddings": 64, "layers": [)" +
         layers + "]" + extra + "}";
}

TEST(ModelConfig, RefusesOneLineNamingFileFieldAndValue) {
  const std::string dense = R"({"num_experts": 0, "intermediate_size": 20})";
  EXPECT_EQ(refusal(ours(dense)), "accepted");
  EXPECT_THROW(ModelConfig::from_json("[1, 2", "config.json"), CorruptFile);
  EXPECT_EQ(refusal("[1, 2]"), "config.json: [1,2] is not an object");
  EXPECT_EQ(refusal(R"({"architectures": ["BertModel"]})"),
            "config.json: architectures: 'BertModel' is not supported (supported: LlamaForCausalLM, GPT2LMHeadModel, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, MixtralForCausalLM, OlmoeForCausalLM, "
            "Qwen3MoeForCausalLM, Qwen2MoeForCausalLM, GraniteMoeForCausalLM, PhimoeForCausalLM, Glm4MoeForCausalLM, "
            "GptOssForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, CoterieForCausalLM)");
  EXPECT_EQ(refusal("{}"), "config.json: model_type: missing");
  EXPECT_EQ(refusal(ours(dense, R"(, "num_expert": 3)")), "config.json: num_expert: unknown key (3)");
  EXPECT_EQ(refusal(ours(dense, R"(, "a\nb": 3)")), "config.json: a?b: unknown key (3)");
  EXPECT_EQ(refusal(ours(dense, R"(, "rope_theta": "x")")), "config.json: rope_theta: \"x\" is not a number");
  EXPECT_EQ(refusal(ours(dense, R"(, "norm_type": "batch")")),
            "config.json: norm_type: 'batch' is not one of rms_norm, layer_norm");
  EXPECT_EQ(refusal(ours(dense, R"(, "head_dim": 5)")), "config.json: head_dim: 5 is odd, rotary positions need pairs");
  EXPECT_EQ(refusal(ours(dense, R"(, "rope_scaling": {"rope_type": "factors", "factors": [1, 2, 3]})")),
            "config.json: rope_scaling.factors: 3 numbers, not 2");
  EXPECT_EQ(refusal(ours(dense, R"(, "rope_scaling": {"rope_type": "factors", "factors": [1, 0]})")),
            "config.json: rope_scaling.factors: 0.0 is not positive");
  EXPECT_EQ(refusal(ours(dense, R"(, "num_key_value_heads": 2)")),
            "config.json: num_key_value_heads: 2 does not divide num_attention_heads (3)");
  EXPECT_EQ(refusal(ours(dense, R"(, "num_hidden_layers": 2)")),
            "config.json: num_hidden_layers: 2, but layers lists 1");
  EXPECT_EQ(refusal(ours(dense, R"(, "hidden_act": "mish")")),
            "config.json: hidden_act: 'mish' is not supported (supported: silu, gelu, gelu_new, gelu_pytorch_tanh, "
            "relu)");
  EXPECT_EQ(refusal(ours("")), "config.json: layers: empty");
  EXPECT_EQ(refusal(ours("{}")), "config.json: layers[0].intermediate_size: 0 is not in [1, 16777216]");
  EXPECT_EQ(refusal(ours(R"({"intermediate_size": 8, "top_k": 2})")),
            "config.json: layers[0].top_k: unknown key of a dense layer (2)");
  EXPECT_EQ(refusal(ours(R"({"num_experts": 8, "top_k": 9, "expert_intermediate_size": 4})")),
            "config.json: layers[0].top_k: 9 is not in [1, 8], the number of experts");
  EXPECT_EQ(refusal(ours(R"({"num_experts": 8, "expert_intermediate_size": 4, "intermediate_size": 4})")),
            "config.json: layers[0].intermediate_size: 4 given, but residual is \"none\"");
  const auto router = [](const std::string& keys) {
    return refusal(ours(R"({"num_experts": 8, "expert_intermediate_size": 4, "router": {)" + keys + "}}"));
  };
  EXPECT_EQ(router(R"("noise": 0.1)"), "config.json: layers[0].router.noise: unknown key (0.1)");
  EXPECT_EQ(router(R"("drop_policy": "first")"),
            "config.json: layers[0].router.drop_policy: 'first' is not one of random, position, probability");
  EXPECT_EQ(router(R"("chooser": "experts")"),
            "config.json: layers[0]: [router] chooser (experts) needs a capacity_factor above 0");
  EXPECT_EQ(router(R"("num_groups": 3)"),
            "config.json: layers[0]: [router] num_groups (3) does not divide num_experts (8)");
}

TEST(ModelConfig, RefusesWhatWeLackOfOtherArchitectures) {
  const auto llama = [](const std::string& extra) {
    return R"({"architectures": ["LlamaForCausalLM"], )" + extra + "}";
  };
  EXPECT_EQ(refusal(llama(R"("rope_scaling": {"type": "su", "factor": 8.0})")),
            "config.json: rope_scaling.type: 'su' is not supported (supported: default, linear, dynamic, llama3, yarn, "
            "longrope)");
  EXPECT_EQ(refusal(llama(R"("rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1})")),
            "config.json: rope_scaling.high_freq_factor: missing");
  EXPECT_EQ(refusal(llama(R"("rope_parameters": {"rope_type": "yarn"})")),
            "config.json: rope_parameters.factor: missing");
  EXPECT_EQ(refusal(llama(R"("rope_parameters": {"rope_type": "linear", "factor": 0.5})")),
            "config.json: rope_parameters.factor: 0.5 is below 1");
  EXPECT_EQ(refusal(llama(R"("rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 3})")),
            "config.json: rope_parameters.beta_fast: not supported (3)");
  EXPECT_EQ(
      refusal(llama(R"("rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 9})")),
      "config.json: rope_scaling.original_max_position_embeddings: 9 is not 2048, max_position_embeddings");
  EXPECT_EQ(refusal(llama(R"("partial_rotary_factor": 0.5)")),
            "config.json: partial_rotary_factor: 0.5 is not supported (only 1.0)");
  EXPECT_EQ(refusal(llama(R"("layer_types": ["full_attention", "sliding_attention"])")),
            "config.json: layer_types: \"sliding_attention\" is not supported (only \"full_attention\")");
  EXPECT_EQ(refusal(llama(R"("quantization_config": {"bits": 4})")),
            "config.json: quantization_config.quant_method: missing");
  EXPECT_EQ(refusal(llama(R"("quantization_config": {"quant_method": "gptq"})")),
            "config.json: quantization_config.quant_method: 'gptq' is not supported");
  EXPECT_EQ(refusal(R"({"model_type": "mistral", "sliding_window": 0})"), "config.json: sliding_window: 0 is below 1");
  EXPECT_EQ(refusal(R"({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]})"),
            "config.json: layer_types: \"chunked_attention\" is not supported (supported: full_attention, "
            "sliding_attention)");
  EXPECT_EQ(refusal(R"({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]})"),
            "config.json: layer_types: \"sliding_attention\" without use_sliding_window");
  EXPECT_EQ(refusal(R"({"model_type": "phimoe", "num_experts_per_tok": 3})"),
            "config.json: num_experts_per_tok: 3 is not supported (only 2)");
  EXPECT_EQ(refusal(R"({"model_type": "phimoe", "rope_scaling": {"type": "yarn", "factor": 4}})"),
            "config.json: rope_scaling.type: 'yarn' is not supported in this architecture (supported: default, "
            "longrope)");
  EXPECT_EQ(refusal(R"({"model_type": "glm4_moe", "scoring_func": "softmax"})"),
            "config.json: scoring_func: 'softmax' is not supported (only 'sigmoid')");
  EXPECT_EQ(refusal(R"({"model_type": "glm4_moe", "partial_rotary_factor": 1.5})"),
            "config.json: partial_rotary_factor: 1.5 of a head of 42");
  EXPECT_EQ(refusal(R"({"model_type": "granitemoe", "residual_multiplier": -1})"),
            "config.json: residual_multiplier: -1.0 is not positive");
  EXPECT_EQ(refusal(R"({"model_type": "qwen3_moe", "use_sliding_window": true})"),
            "config.json: use_sliding_window: true is not supported");
  EXPECT_EQ(refusal(R"({"model_type": "gpt_oss", "swiglu_limit": 5})"),
            "config.json: swiglu_limit: 5.0 is not supported (only 7.0)");
  EXPECT_EQ(refusal(R"({"model_type": "gpt_oss", "quantization_config": {"quant_method": "awq"}})"),
            "config.json: quantization_config.quant_method: 'awq' is not supported");
  EXPECT_EQ(refusal(R"({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}})"), "accepted");
  EXPECT_EQ(refusal(R"({"model_type": "deepseek_v2", "norm_topk_prob": true})"),
            "config.json: norm_topk_prob: true is not supported");
  EXPECT_EQ(refusal(R"({"model_type": "deepseek_v2", "topk_method": "noaux_tc"})"),
            "config.json: topk_method: 'noaux_tc' is not supported (supported: greedy, group_limited_greedy)");
  EXPECT_EQ(refusal(R"({"model_type": "deepseek_v3", "num_key_value_heads": 8})"),
            "config.json: num_key_value_heads: 8 is not num_attention_heads (128), as latent attention needs it");
  EXPECT_EQ(refusal(R"({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}})"),
            "config.json: quantization_config.quant_method: 'fp8' is not supported");
  EXPECT_EQ(refusal(R"({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": true})"),
            "config.json: scale_attn_by_inverse_layer_idx: true is not supported");
  EXPECT_EQ(refusal(R"({"model_type": "gpt2", "n_head": 7})"), "config.json: n_head: 7 does not divide n_embd (768)");
  EXPECT_EQ(refusal(R"({"model_type": "llama", "num_hidden_layers": 1000000000})"),
            "config.json: num_hidden_layers: 1000000000 is not in [1, 10000]");
}

// Whatever a file's own checks let through must not become NaN in fp32.
TEST(ModelConfig, RefusesRotationsThatFp32CannotHold) {
  ModelConfig good = ModelConfig::from_json(ours(R"({"num_experts": 0, "intermediate_size": 20})"), "config.json");
  RopeScaling yarn = {.kind = RopeScalingKind::kYarn, .factor = 4, .original_context = 16};
  const auto refusal_of = [&](const auto& change, RopeScaling scaling) {
    ModelConfig config = good;
    change(scaling);
    config.rope_scaling = std::move(scaling);
    return invalid_message([&] { config.validate("F"); }, "F: rope_scaling");
  };
  const double nan = std::nan(""), inf = INFINITY;
  EXPECT_EQ(refusal_of([](RopeScaling&) {}, yarn), "");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.factor = nan; }, yarn), ".factor: nan is not finite in fp32");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.factor = 1e300; }, yarn), ".factor: 1e+300 is not finite in fp32");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.factor = 0; }, yarn), ".factor: 0.0 is not positive");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.beta_fast = inf; }, yarn), ".beta_fast: inf is not finite in fp32");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.beta_slow = 0; }, yarn), ".beta_slow: 0.0 is not positive");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.attention_factor = -inf; }, yarn),
            ".attention_factor: -inf is not finite in fp32");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.mscale = nan; }, yarn), ".mscale: nan is not finite in fp32");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.mscale_all_dim = -1; }, yarn),
            ".mscale_all_dim: -1.0 is not zero or positive");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.original_context = 0; }, yarn),
            ".original_max_position_embeddings: 0 is not in [1, 1073741824]");
  const RopeScaling longrope = {
      .kind = RopeScalingKind::kLongrope, .original_context = 16, .short_factors = {1, 2}, .long_factors = {2, 3}};
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.short_mscale = nan; }, longrope),
            ".short_mscale: nan is not finite in fp32");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.long_factors[1] = nan; }, longrope),
            ".long_factor: nan is not finite in fp32");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.short_factors[0] = 1e-38; }, longrope),
            ".short_factor: position 64 turns by inf");
  EXPECT_EQ(refusal_of([&](RopeScaling& s) { s.long_factors[0] = 1e-40; }, longrope),
            ".long_factor: position 64 turns by inf");
}

TEST(ModelConfig, RefusesScalingOfAFileThatFp32CannotHold) {
  const auto yarn = [](const std::string& keys) {
    return refusal(R"({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4, )" + keys + "}}");
  };
  EXPECT_EQ(yarn(R"("attention_factor": 1.5)"), "accepted");
  EXPECT_EQ(yarn(R"("attention_factor": 1e39)"),
            "config.json: rope_scaling.attention_factor: 1e+39 is not finite in fp32");
  EXPECT_EQ(yarn(R"("mscale": 1e200)"), "config.json: rope_scaling.mscale: 1e+200 is not finite in fp32");
  EXPECT_EQ(refusal(R"({"model_type": "llama", "rope_theta": 1e-39})"),
            "config.json: rope_theta: position 2048 turns by inf");
  EXPECT_EQ(refusal(R"({"architectures": ["evil\nFAKE\u001b[31m"]})").substr(0, 53),
            R"(config.json: architectures: 'evil\x0aFAKE\x1b[31m' is)");
}

TEST(ModelConfig, RefusesLongropeByFieldAndValue) {
  const auto longrope = [](const std::string& type, const std::string& keys) {
    return refusal(R"({"model_type": ")" + type + R"(", "head_dim": 4, "rope_scaling": {"type": "longrope", )" + keys +
                   "}}");
  };
  const std::string factors = R"("short_factor": [1, 2], "long_factor": [3, 4])";
  EXPECT_EQ(longrope("llama", factors), "accepted");
  EXPECT_EQ(longrope("llama", R"("short_factor": [1, 2])"), "config.json: rope_scaling.long_factor: missing");
  EXPECT_EQ(longrope("llama", R"("short_factor": [1], "long_factor": [3, 4])"),
            "config.json: rope_scaling.short_factor: 1 numbers, not 2, one for each pair of dimensions that turns");
  EXPECT_EQ(longrope("llama", R"("short_factor": [1, 2], "long_factor": [3, 4, 5])"),
            "config.json: rope_scaling.long_factor: 3 numbers, not 2, one for each pair of dimensions that turns");
  EXPECT_EQ(longrope("llama", R"("short_factor": [1, 2], "long_factor": [3, 0])"),
            "config.json: rope_scaling.long_factor: 0.0 is not positive");
  EXPECT_EQ(longrope("llama", R"("short_factor": [1, "2"], "long_factor": [3, 4])"),
            "config.json: rope_scaling.short_factor: \"2\" is not a number");
  EXPECT_EQ(longrope("llama", factors + R"(, "attention_factor": -1)"),
            "config.json: rope_scaling.attention_factor: -1.0 is negative");
  EXPECT_EQ(longrope("llama", factors + R"(, "factor": 0.5)"), "config.json: rope_scaling.factor: 0.5 is below 1");
  EXPECT_EQ(longrope("llama", factors + R"(, "original_max_position_embeddings": 1)"),
            "config.json: rope_scaling.original_max_position_embeddings: 1 is below 2");
  EXPECT_EQ(longrope("llama", factors + R"(, "short_mscale": 1.2)"),
            "config.json: rope_scaling.short_mscale: not supported (1.2)");
  EXPECT_EQ(longrope("phimoe", factors + R"(, "short_mscale": 1.2)"), "config.json: rope_scaling.long_mscale: missing");
  EXPECT_EQ(longrope("phimoe", factors + R"(, "short_mscale": 0, "long_mscale": 1.2)"),
            "config.json: rope_scaling.short_mscale: 0.0 is not positive");
  EXPECT_EQ(longrope("phimoe", factors + R"(, "short_mscale": 1.2, "long_mscale": 1.2)"), "accepted");
  // Of our own files, which have no check before that of all models.
  EXPECT_EQ(refusal(ours(R"({"intermediate_size": 20})", R"(, "rope_scaling": {"rope_type": "longrope", )"
                                                         R"("short_factor": [1, 2], "long_factor": [3]})")),
            "config.json: rope_scaling.long_factor: 1 numbers, not 2");
}

// As Phi-3.5-MoE has it: another name than transformers', and the original context twice.
TEST(ModelConfig, ReadsPublishedFilesOfPhiMoe) {
  const ModelConfig c = ModelConfig::from_json(
      R"({"architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "head_dim": 4,
          "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
          "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096, "short_factor": [1, 1.5],
                           "long_factor": [2, 30.25], "short_mscale": 1.25, "long_mscale": 1.5}})",
      "");
  EXPECT_EQ(c.architecture, "PhimoeForCausalLM");
  EXPECT_EQ(c.rope_theta, 1e4);
  EXPECT_EQ(c.rope_scaling, (RopeScaling{.kind = RopeScalingKind::kLongrope,
                                         .factor = 32,
                                         .original_context = 4096,
                                         .short_factors = {1, 1.5},
                                         .long_factors = {2, 30.25},
                                         .short_mscale = 1.25,
                                         .long_mscale = 1.5}));
  EXPECT_EQ(c.max_context(), 131072);
  EXPECT_EQ(c.rope_scaling.angle_factor(4096), 1.25);
  EXPECT_EQ(c.rope_scaling.angle_factor(4097), 1.5);
}

// Also where it stands inside, and for the factor that follows.
TEST(ModelConfig, TheOriginalContextOutsideOfTheRotaryKeysCounts) {
  const auto yarn = [](const std::string& keys, const std::string& outside) {
    return ModelConfig::from_json(R"({"model_type": "llama", "max_position_embeddings": 1000, "rope_scaling": )"
                                  R"({"type": "yarn", "factor": null)" +
                                      keys + "}" + outside + "}",
                                  "")
        .rope_scaling;
  };
  const std::string key = R"(, "original_max_position_embeddings": )";
  EXPECT_EQ(yarn(key + "500", "").original_context, 500);
  EXPECT_EQ(yarn("", key + "250").original_context, 250);
  EXPECT_EQ(yarn(key + "500", key + "250").original_context, 250);
  EXPECT_EQ(yarn(key + "500", key + "250").factor, 4);
}

TEST(ModelConfig, ReadsOldAndNewRotaryKeys) {
  const auto theta = [](const std::string& keys) {
    return ModelConfig::from_json(R"({"model_type": "llama")" + keys + "}", "").rope_theta;
  };
  EXPECT_EQ(theta(""), 1e4);
  EXPECT_EQ(theta(R"(, "rope_theta": 5e5, "rope_scaling": null)"), 5e5);
  EXPECT_EQ(theta(R"(, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5})"), 3e5);
  EXPECT_EQ(theta(R"(, "rope_theta": 5e5, "rope_scaling": {"type": "default"})"), 5e5);
  EXPECT_EQ(ModelConfig::from_json(R"({"model_type": "mixtral"})", "").rope_theta, 1e6);
}

TEST(ModelConfig, WindowsFollowTheRuleOfTheirArchitecture) {
  const auto windows = [](const std::string& json) {
    std::vector<int64_t> result;
    for (const LayerConfig& layer : ModelConfig::from_json(json, "").layers) result.push_back(layer.window);
    return result;
  };
  using Windows = std::vector<int64_t>;
  EXPECT_EQ(windows(R"({"model_type": "mistral", "num_hidden_layers": 2})"), (Windows{4096, 4096}));
  EXPECT_EQ(windows(R"({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": null})"), (Windows{0, 0}));
  EXPECT_EQ(windows(R"({"model_type": "mixtral", "num_hidden_layers": 1, "sliding_window": 64})"), (Windows{64}));
  const std::string qwen = R"({"model_type": "qwen3", "num_hidden_layers": 3, "sliding_window": 8, )";
  EXPECT_EQ(windows(qwen + R"("max_window_layers": 1})"), (Windows{0, 0, 0}));
  EXPECT_EQ(windows(qwen + R"("max_window_layers": 1, "use_sliding_window": true})"), (Windows{0, 8, 8}));
  EXPECT_EQ(windows(qwen + R"("use_sliding_window": true,
                             "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})"),
            (Windows{8, 0, 8}));
}

TEST(ModelConfig, ContextGrowsWithTheStretch) {
  const auto context = [](const std::string& keys) {
    return ModelConfig::from_json(
               R"({"model_type": "llama", "max_position_embeddings": 1000, "rope_scaling": {)" + keys + "}}", "")
        .max_context();
  };
  EXPECT_EQ(context(R"("type": "linear", "factor": 2.5)"), 2500);
  EXPECT_EQ(context(R"("type": "dynamic", "factor": 2)"), 2000);
  EXPECT_EQ(context(R"("type": "yarn", "factor": 4, "original_max_position_embeddings": 250)"), 1000);
  EXPECT_EQ(context(R"("type": "yarn", "factor": 4)"), 4000);
  EXPECT_EQ(context(R"("type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4)"), 1000);
}

TEST(ModelConfig, SaysWhatIsNotTrained) {
  const std::string dense = R"({"intermediate_size": 20})";
  const auto untrainable = [](const std::string& json) { return ModelConfig::from_json(json, "").untrainable(); };
  EXPECT_EQ(untrainable(ours(dense)), "");
  EXPECT_EQ(untrainable(ours(dense, R"(, "rope_scaling": {"rope_type": "linear", "factor": 2})")),
            "rope_scaling: stretching of positions is not trained");
  EXPECT_EQ(untrainable(ours(dense, R"(, "rotary_dim": 2)")), "rotary_dim: 2 is not trained");
  EXPECT_EQ(untrainable(ours(dense, R"(, "rope_interleaved": true)")), "rope_interleaved: true is not trained");
  EXPECT_EQ(untrainable(ours(dense, R"(, "attention_sinks": true)")), "attention_sinks: true is not trained");
  EXPECT_EQ(untrainable(ours(dense, R"(, "logits_scaling": 2.5)")), "logits_scaling: 2.5 is not trained");
  EXPECT_EQ(untrainable(ours(dense, R"(, "hidden_act": "clamped_swiglu")")),
            "hidden_act: clamped_swiglu is not trained");
  EXPECT_EQ(untrainable(ours(R"({"intermediate_size": 20, "window": 3})")), "layers[0].window: 3 is not trained");
  EXPECT_EQ(untrainable(ours(R"({"num_experts": 2, "expert_intermediate_size": 4, "router": {"logit_bias": true}})")),
            "layers[0].router.logit_bias: true is not trained");
}

TEST(ModelConfig, QwenLayersFollowSparseStepAndDenseList) {
  const ModelConfig c = ModelConfig::from_json(
      R"({"model_type": "qwen2_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})", "");
  std::string kinds;
  for (const LayerConfig& layer : c.layers) kinds += layer.is_moe() ? 'M' : 'd';
  EXPECT_EQ(kinds, "dMdddM");
  EXPECT_EQ(c.layers[1].residual, ResidualKind::kSharedGate);
  EXPECT_TRUE(c.attention_bias);
  EXPECT_FALSE(c.attention_output_bias);
}

TEST(ModelConfig, JsonRoundTripKeepsEveryField) {
  ModelConfig c;
  c.vocab_size = 97, c.hidden_size = 24, c.num_heads = 6, c.num_kv_heads = 3, c.head_dim = 10;
  c.max_position_embeddings = 77, c.norm = NormKind::kLayerNorm, c.norm_eps = 1e-6f;
  c.positions = PositionKind::kLearned, c.rope_theta = 12345.5, c.qk_norm = QkNorm::kHead, c.clip_qkv = 7.5f;
  c.activation = Activation::kGeluTanh, c.gated_mlp = false, c.attention_bias = true, c.attention_output_bias = true;
  c.mlp_bias = true, c.tie_word_embeddings = false, c.initializer_range = 0.014f, c.bos_token_id = 3;
  c.eos_token_ids = {4, 5};
  c.attention_sinks = true, c.lm_head_bias = true, c.embedding_multiplier = 1.5f, c.attention_multiplier = 0.3f;
  c.residual_multiplier = 0.25f, c.logits_scaling = 6.5f;
  LayerConfig moe;
  moe.window = 31;
  moe.intermediate_size = 30, moe.expert_intermediate_size = 18, moe.residual = ResidualKind::kLearned;
  moe.router = {.num_experts = 12,
                .top_k = 2,
                .score_function = ScoreFunction::kSigmoid,
                .num_groups = 4,
                .top_k_groups = 3,
                .group_score = GroupScore::kTopTwo,
                .choice_bias = true,
                .normalize = true,
                .normalize_over = NormalizeOver::kKept,
                .routed_scaling = 2.5f,
                .choice_noise = ChoiceNoise::kSecondExpert,
                .jitter = 0.01f,
                .capacity_factor = 1.25f,
                .eval_capacity_factor = 2.0f,
                .min_capacity = 2,
                .drop_policy = DropPolicy::kProbability};
  LayerConfig experts_choose{.expert_intermediate_size = 8};
  experts_choose.router = {.num_experts = 4, .chooser = Chooser::kExperts, .capacity_factor = 1.0f};
  c.layers = {LayerConfig{.intermediate_size = 40}, moe, experts_choose};
  const std::string json = c.to_json();
  const ModelConfig read = ModelConfig::from_json(json, "config.json");
  EXPECT_EQ(read.to_json(), json);
  const RouterConfig &router = read.layers[1].router, &wanted = moe.router;
  EXPECT_EQ(read.layers[2].router.chooser, Chooser::kExperts);
  EXPECT_EQ(router.group_score, wanted.group_score);
  EXPECT_EQ(router.normalize_over, wanted.normalize_over);
  EXPECT_EQ(router.choice_noise, wanted.choice_noise);
  EXPECT_EQ(router.drop_policy, wanted.drop_policy);
  EXPECT_EQ(router.top_k_groups, 3);
  EXPECT_TRUE(router.choice_bias);
  EXPECT_EQ(router.jitter, 0.01f);
  EXPECT_EQ(router.eval_capacity_factor, 2.0f);
  EXPECT_EQ(read.layers[1].window, 31);
  EXPECT_TRUE(read.attention_sinks && read.lm_head_bias);
  EXPECT_EQ(read.embedding_multiplier, 1.5f);
  EXPECT_EQ(read.attention_multiplier, 0.3f);
  EXPECT_EQ(read.residual_multiplier, 0.25f);
  EXPECT_EQ(read.logits_scaling, 6.5f);
  EXPECT_NE(json.find("\"norm_eps\": 1e-06"), std::string::npos) << json;
  EXPECT_NE(json.find("\"capacity_factor\": 1.25"), std::string::npos) << json;
  EXPECT_NE(json.find("\"eos_token_id\": [\n    4,\n    5\n  ]"), std::string::npos) << json;
}

TEST(ModelConfig, JsonRoundTripKeepsRotaryAndLatentFields) {
  ModelConfig c;
  c.vocab_size = 97, c.hidden_size = 24, c.num_heads = c.num_kv_heads = 3, c.head_dim = 14;
  c.max_position_embeddings = 77, c.rope_interleaved = true;
  LayerConfig layer{.expert_intermediate_size = 8};
  layer.router = {.num_experts = 4,
                  .score_function = ScoreFunction::kSparsemixer,
                  .sparsemixer_epsilon = 0.03f,
                  .logit_bias = true};
  c.layers = {layer};
  const auto reread = [&] { return ModelConfig::from_json(c.to_json(), "config.json"); };
  c.rotary_dim = 6;
  EXPECT_EQ(reread().rotary_dim, 6);
  EXPECT_TRUE(reread().rope_interleaved && reread().layers[0].router.logit_bias);
  EXPECT_EQ(reread().layers[0].router.score_function, ScoreFunction::kSparsemixer);
  EXPECT_EQ(reread().layers[0].router.sparsemixer_epsilon, 0.03f);
  c.rotary_dim = 0;
  c.latent = {.kv_rank = 20, .q_rank = 11, .nope_dim = 8, .rope_dim = 6, .v_dim = 10, .norm_eps = 2e-6f};
  EXPECT_EQ(reread().latent, c.latent);
  const RopeScaling scalings[] = {{.kind = RopeScalingKind::kLinear, .factor = 2.5},
                                  {.kind = RopeScalingKind::kDynamic, .factor = 3, .original_context = 77},
                                  {.kind = RopeScalingKind::kLlama3,
                                   .factor = 8,
                                   .original_context = 20,
                                   .low_freq_factor = 1.5,
                                   .high_freq_factor = 3},
                                  {.kind = RopeScalingKind::kYarn,
                                   .factor = 4,
                                   .original_context = 19,
                                   .beta_fast = 30,
                                   .beta_slow = 2,
                                   .truncate = false,
                                   .attention_factor = 1.1,
                                   .mscale = 0.7,
                                   .mscale_all_dim = 0.8},
                                  {.kind = RopeScalingKind::kLongrope,
                                   .factor = 3.5,
                                   .original_context = 21,
                                   .attention_factor = 1.2,
                                   .short_factors = {1, 1.1, 1.25},
                                   .long_factors = {2, 3.3, 1e3},
                                   .short_mscale = 1.3,
                                   .long_mscale = 1.4}};
  for (const RopeScaling& scaling : scalings) {
    c.rope_scaling = scaling;
    EXPECT_EQ(reread().rope_scaling, scaling);
  }
}

// The models of the DeepSpeed-MoE paper (arXiv 2201.05596, tables 1 to 3 and 6): GPT-style decoders
// with tied output, sequence 2048, every second layer a MoE layer, and the sizes it prints.
struct Published {
  const char* name;
  int64_t num_layers;
  int64_t hidden_size;
  std::vector<int64_t> experts;  // of the MoE layers, in order
  bool residual;
  double parameters;
};

std::vector<int64_t> pyramid(int small_layers, int64_t small, int large_layers, int64_t large) {
  std::vector<int64_t> experts(small_layers, small);
  experts.insert(experts.end(), large_layers, large);
  return experts;
}

ModelConfig gpt_moe(const Published& model) {
  ModelConfig c;
  c.vocab_size = 50257, c.hidden_size = model.hidden_size, c.max_position_embeddings = 2048;
  c.num_heads = c.num_kv_heads = model.hidden_size / 64, c.head_dim = 64;
  c.norm = NormKind::kLayerNorm, c.positions = PositionKind::kLearned, c.activation = Activation::kGelu;
  c.gated_mlp = false, c.attention_bias = c.attention_output_bias = c.mlp_bias = true;
  c.layers.assign(model.num_layers, LayerConfig{.intermediate_size = 4 * model.hidden_size});
  for (size_t i = 0; i < model.experts.size(); ++i) {
    LayerConfig& layer = c.layers.at(2 * i + 1);
    layer.router.num_experts = model.experts[i];
    layer.expert_intermediate_size = 4 * model.hidden_size;
    layer.residual = model.residual ? ResidualKind::kSum : ResidualKind::kNone;
    if (!model.residual) layer.intermediate_size = 0;
  }
  return c;
}

TEST(ModelConfig, ParameterCountsOfTheDeepSpeedMoePaper) {
  const Published models[] = {
      {"350M+MoE-128", 24, 1024, pyramid(12, 128, 0, 0), false, 13e9},
      {"1.3B+MoE-128", 24, 2048, pyramid(12, 128, 0, 0), false, 52e9},
      // Printed as 4B, a single digit; the paper's formula gives 4.11B.
      {"350M+PR-MoE-32/64", 24, 1024, pyramid(10, 32, 2, 64), true, 4.11e9},
      {"1.3B+PR-MoE-64/128", 24, 2048, pyramid(10, 64, 2, 128), true, 31e9},
      {"350M PR-MoE, 21 layers", 21, 1024, pyramid(8, 32, 2, 64), true, 3.5e9},
      {"1.3B PR-MoE, 21 layers", 21, 2048, pyramid(8, 64, 2, 128), true, 27e9},
      {"2.4B+MoE-128", 16, 3584, pyramid(8, 128, 0, 0), false, 107.7e9},
      {"8B+MoE-128", 40, 4096, pyramid(20, 128, 0, 0), false, 349.0e9},
      {"24B+MoE-128", 30, 8192, pyramid(15, 128, 0, 0), false, 1046.9e9},
      {"47B+MoE-128", 58, 8192, pyramid(29, 128, 0, 0), false, 2024.0e9},
  };
  for (const Published& model : models) {
    const ModelConfig c = gpt_moe(model);
    c.validate(model.name);
    EXPECT_NEAR(static_cast<double>(c.num_parameters()), model.parameters, 0.015 * model.parameters) << model.name;
    // One expert of four h^2 times two per MoE layer stays active.
    int64_t idle = 0;
    for (const int64_t experts : model.experts) {
      idle += (experts - 1) * (8 * c.hidden_size * c.hidden_size + 5 * c.hidden_size);
    }
    EXPECT_EQ(c.num_active_parameters(), c.num_parameters() - idle) << model.name;
  }
}

TEST(ModelConfig, ParameterCountOfGpt2IsExact) {
  EXPECT_EQ(ModelConfig::from_json(R"({"model_type": "gpt2"})", "").num_parameters(), 124439808);
}

}  // namespace
}  // namespace coterie
