// A GGUF file of a Llama model, seen as what it was converted from: a ModelConfig, and a checkpoint
// with the names and row orders of Hugging Face, which the tables in architecture_llama.cc then map to
// logical tensors. Whatever the file asks for that we lack is refused by name.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "io/gguf.h"
#include "model/config.h"

namespace coterie {

// general.architecture must be "llama", without experts and without scaled rotary positions; a
// "llama." key that we don't know is refused, since it could change the result. InvalidArgument
// "FILE: KEY: what". The output is tied to the embeddings when the file has no output.weight.
ModelConfig config_from_gguf(const GgufSource& file);

// The file's tensors as a LlamaForCausalLM checkpoint. The converter reorders the rows of every q and
// k head so that the two numbers that rotary positions turn together are neighbours (row 2 i + s for
// i in the head's half s); reading undoes that. Thread-safe like the file.
class GgufLlamaSource : public TensorSource {
 public:
  GgufLlamaSource(const GgufSource& file, const ModelConfig& config);  // file must outlive this

  const std::string& path() const override { return file_.path(); }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  const StoredTensor* find(const std::string& name) const override;
  void read(const std::string& name, float* out) const override;

 private:
  struct Place {
    size_t index = 0;          // in the file's tensors and in tensors_
    int64_t turned_heads = 0;  // heads whose rows are reordered; 0: none
  };

  const GgufSource& file_;
  std::vector<StoredTensor> tensors_;
  std::unordered_map<std::string, Place> places_;
};

}  // namespace coterie
