// Writing a model with its matrices in few bits, so that loading it rounds nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "base/thread_pool.h"

namespace coterie {

struct QuantizeOptions {
  std::string dtype = "int8";        // "int8", "int4" or "int4_64"
  std::string attention_dtype = "";  // as in EngineOptions
  std::string head_dtype = "";
  size_t shard_bytes = 1'000'000'000;  // of a file, about
};

// Called when `done` of the model's `total` elements are written.
using QuantizeProgress = std::function<void(int64_t done, int64_t total)>;

// Reads any model that we support and writes it to out_dir (made when absent) as a CoterieForCausalLM whose config.json
// has "quantization_config": {"quant_method": "coterie", "dtype", "attention_dtype", "head_dtype"}. Matrices of these
// types are stored as model/quantized_source.h has them, experts that lie in MXFP4 as they are, and everything else in
// bf16 where that loses nothing, or else in fp32. Loading it gives, bit for bit, what loading the source with the same
// options gives. In memory are one tensor and one file.
//
// InvalidArgument for another dtype, and for an out_dir that holds a model already.
void quantize_model(const std::string& source, const std::string& out_dir, const QuantizeOptions& options,
                    ThreadPool& pool, const QuantizeProgress& progress = {});

}  // namespace coterie
