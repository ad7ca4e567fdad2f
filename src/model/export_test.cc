#include "model/export.h"

#include <gtest/gtest.h>

#include "io/test_files.h"
#include "model/stored_model.h"
#include "model/test_model.h"

namespace coterie {
namespace {

class ExportTest : public TemporaryDirectoryTest {
 protected:
  std::string path(const std::string& name) const { return (directory() / name).string(); }

  // Exports a random model and compares every logical tensor of the two; returns the architecture.
  std::string round_trip(const ModelConfig& config, const std::string& architecture) {
    write_random_model(path("source"), config);
    const std::string written = export_model(path("source"), path("out"), architecture);
    const StoredModel source(path("source")), out(path("out"));
    EXPECT_EQ(out.config().architecture, written);
    for (const MappedTensor& tensor : source.tensors().tensors()) {
      EXPECT_EQ(source.tensors().read(tensor.spec.name), out.tensors().read(tensor.spec.name)) << tensor.spec.name;
    }
    return written;
  }

  std::string refusal(const ModelConfig& config, const std::string& architecture) {
    write_random_model(path("source"), config);
    return invalid_message([&] { export_model(path("source"), path("out"), architecture); }, path("source") + ": ");
  }
};

ModelConfig small_dense() {
  ModelConfig c = small_config();
  c.hidden_size = 24;  // head_dim is another, but transformers wants it to be a multiple of the heads
  c.layers = {c.layers[0], c.layers[0]};
  return c;
}

ModelConfig small_moe(bool first_layer_dense) {
  ModelConfig c = small_config();
  c.layers = {c.layers[first_layer_dense ? 0 : 1], c.layers[1]};
  return c;
}

TEST_F(ExportTest, AutoFindsTheArchitectureThatFits) {
  EXPECT_EQ(round_trip(small_dense(), "auto"), "LlamaForCausalLM");

  ModelConfig mixtral = small_moe(false);
  for (LayerConfig& layer : mixtral.layers) layer.router.normalize = true;
  EXPECT_EQ(round_trip(mixtral, "auto"), "MixtralForCausalLM");

  ModelConfig olmoe = small_moe(false);
  olmoe.qk_norm = QkNorm::kFull, olmoe.clip_qkv = 3.5f, olmoe.hidden_size = 60;  // no head_dim of its own
  EXPECT_EQ(round_trip(olmoe, "auto"), "OlmoeForCausalLM");

  ModelConfig qwen3 = small_moe(true);
  qwen3.qk_norm = QkNorm::kHead;
  EXPECT_EQ(round_trip(qwen3, "auto"), "Qwen3MoeForCausalLM");

  ModelConfig qwen2 = small_moe(true);
  qwen2.layers[1].residual = ResidualKind::kSharedGate, qwen2.layers[1].intermediate_size = 24;
  qwen2.attention_bias = true, qwen2.hidden_size = 60;
  EXPECT_EQ(round_trip(qwen2, "auto"), "Qwen2MoeForCausalLM");

  ModelConfig gpt2 = small_dense();
  gpt2.norm = NormKind::kLayerNorm, gpt2.positions = PositionKind::kLearned, gpt2.gated_mlp = false;
  gpt2.attention_bias = gpt2.attention_output_bias = gpt2.mlp_bias = true, gpt2.tie_word_embeddings = true;
  gpt2.num_kv_heads = gpt2.num_heads, gpt2.head_dim = 10, gpt2.hidden_size = 60;
  gpt2.activation = Activation::kGeluTanh;
  EXPECT_EQ(round_trip(gpt2, "auto"), "GPT2LMHeadModel");

  EXPECT_EQ(round_trip(small_config(), "auto"), "CoterieForCausalLM");
}

TEST_F(ExportTest, TrainingIsNoReasonToStayAtHome) {
  ModelConfig c = small_moe(false);
  for (LayerConfig& layer : c.layers) {
    RouterConfig& router = layer.router;
    router.normalize = true, router.normalize_over = NormalizeOver::kKept;
    router.capacity_factor = 1.5f, router.eval_capacity_factor = 2.0f, router.min_capacity = 8;
    router.drop_policy = DropPolicy::kProbability, router.jitter = 0.01f, router.choice_noise = ChoiceNoise::kRSample;
    router.num_groups = router.top_k_groups = router.num_experts;  // every group is chosen
  }
  EXPECT_EQ(round_trip(c, "auto"), "MixtralForCausalLM");
  for (LayerConfig& layer : c.layers) layer.router.top_k_groups = layer.router.top_k;
  EXPECT_EQ(round_trip(c, "auto"), "CoterieForCausalLM");
}

TEST_F(ExportTest, RefusalNamesWhatCannotBeSaid) {
  ModelConfig llama = small_moe(true);
  llama.hidden_size = 24;
  EXPECT_EQ(refusal(llama, "LlamaForCausalLM"), "LlamaForCausalLM cannot express layers[1].num_experts: 7");
  EXPECT_EQ(refusal(small_dense(), "GPT2LMHeadModel"), "GPT2LMHeadModel cannot express num_key_value_heads: 2");
  EXPECT_EQ(refusal(small_moe(false), "MixtralForCausalLM"),
            "MixtralForCausalLM cannot express layers[0].router.normalize: false");
  EXPECT_EQ(refusal(small_moe(true), "LlamaForCausalLM"),
            "LlamaForCausalLM cannot express hidden_size: 20 is not a multiple of num_attention_heads (6)");
  EXPECT_EQ(refusal(small_moe(false), "OlmoeForCausalLM"),
            "OlmoeForCausalLM cannot express head_dim: 10 is not hidden_size / num_attention_heads (20 / 6)");
  EXPECT_EQ(refusal(small_dense(), "BertModel").substr(0, 45), "architectures: 'BertModel' is not supported (");
}

}  // namespace
}  // namespace coterie
