// A split of a packed data directory, mapped read-only: DIR/train.bin or DIR/valid.bin (little-endian
// uint16 or uint32 token ids, every document followed by the end token) and its part of DIR/meta.json.
// InvalidArgument for a directory or split that is not there, CorruptFile when the files contradict
// each other; both name file, field and value. Any number of threads may read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/memory.h"

namespace coterie {

class PackedTokens {
 public:
  PackedTokens(const std::string& directory, const std::string& split);  // split: "train" or "valid"

  const std::string& path() const { return file_.path(); }  // of the .bin file
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_bytes() const { return num_bytes_; }  // of the split's text (UTF-8), for loss per byte
  int64_t vocab_size() const { return vocab_size_; }
  int64_t eos_token_id() const { return eos_token_id_; }

  // i in [0, num_tokens()); as it lies in the file, not held against the vocabulary.
  int32_t operator[](int64_t i) const;

  // Tokens [first, first + count) to out; every id is checked to lie below vocab_size().
  void copy(int64_t first, int64_t count, int32_t* out) const;

 private:
  MappedFile file_;
  size_t token_bytes_ = 0;
  int64_t num_tokens_ = 0;
  int64_t num_bytes_ = 0;
  int64_t vocab_size_ = 0;
  int64_t eos_token_id_ = 0;
};

}  // namespace coterie
