// The checkpoints of a run: DIRECTORY/step-NNNNNNNN/ with manifest.json (checkpoint_manifest.h) and one safetensors
// file per rank, and `latest`, a text file with the newest one's name, which is moved last. Everything is written
// aside (tmp-...), fsynced and renamed: whoever dies at any moment leaves a whole checkpoint behind, and every step-*
// is whole. A step that is saved again, by a run that went back, becomes step-NNNNNNNN.2.
//
// Saving is in three parts, so that any number of ranks on one file system can do it without exchanging more than one
// barrier, and from any thread:
//   1. rank 0: begin(); then a barrier, so that no rank writes before.
//   2. every rank: write_shard().
//   3. rank 0: commit(), which waits for the shards of all ranks.
// InvalidArgument or ResourceExhausted when something can't be written.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "io/json.h"

namespace coterie {

// Elements [first, first + count) of a logical tensor, contiguous at `data`.
struct PieceToWrite {
  std::string tensor;
  std::vector<int64_t> shape;  // of the logical tensor
  DType dtype = DType::kF32;   // fp32, bf16 or fp16
  int64_t first = 0;
  int64_t count = 0;  // 0: nothing is written but that the tensor exists
  const void* data = nullptr;
};

class CheckpointDirectory {
 public:
  explicit CheckpointDirectory(std::string path) : path_(std::move(path)) {}

  // The newest checkpoint's path; nothing when none was ever finished. CorruptFile when `latest` names none.
  std::optional<std::string> latest() const;

  // Clears what saves that were cut off left behind. No other save may be under way.
  void begin(int64_t step) const;

  void write_shard(int64_t step, int rank, std::span<const PieceToWrite> pieces) const;

  struct Commit {
    int num_ranks = 1;
    nlohmann::json state = nlohmann::json::object();
    int64_t keep = 2;         // checkpoints that stay, at least 1: the newest ones
    double timeout_s = 1800;  // for the other ranks' shards; CommError names the rank
  };
  // Returns the checkpoint's path. CorruptFile when the shards together don't cover every tensor once. A stop request
  // ends the wait for other ranks.
  std::string commit(int64_t step, const Commit& commit, std::stop_token stop = {}) const;

 private:
  std::string aside(int64_t step) const;
  void prune(int64_t keep, const std::string& latest) const;

  std::string path_;
};

}  // namespace coterie
