// A GGUF file of a language model, seen as a ModelConfig and a table from its tensors to logical ones. Architectures
// are llama (with or without experts), qwen2, qwen3, qwen2moe, qwen3moe, olmoe, granitemoe, phimoe, glm4moe,
// deepseek2 and gpt-oss. Whatever the file asks for that we lack is refused by name.
#pragma once

#include "io/gguf.h"
#include "model/checkpoint_map.h"
#include "model/config.h"

namespace coterie {

// A metadata key of the architecture that we don't know is refused, since it could change the result.
// InvalidArgument "FILE: KEY: what". The output is tied to the embeddings when the file has no output.weight. Which
// tokens end a text, gguf_end_tokens.h says.
ModelConfig config_from_gguf(const GgufSource& file);

// Where the file keeps the tensors of its model. The converter reorders the rows of every q and k head of some
// architectures so that the two numbers that rotary positions turn together are neighbours (row 2 i + s for i in the
// head's half s); the table undoes that.
CheckpointMap map_of_gguf(const GgufSource& file, const ModelConfig& config);

}  // namespace coterie
