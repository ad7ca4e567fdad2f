// Writing a model in the files of an architecture: config.json and model.safetensors.
#pragma once

#include <string>

namespace coterie {

// Reads any model that we support and writes it to out_dir (made when absent) as `architecture`, or,
// for "auto", as the first Hugging Face architecture that can say all that the model's configuration
// says, else as CoterieForCausalLM. Returns the architecture written. Weights keep the precision in
// which they were stored: bf16 when all were bf16, else fp32.
//
// InvalidArgument names the first thing that the architecture cannot say: "DIR: LlamaForCausalLM
// cannot express layers[1].num_experts: 8". Capacities are a matter of training and are left out.
std::string export_model(const std::string& source_dir, const std::string& out_dir, const std::string& architecture);

}  // namespace coterie
