// The checkpoints of a run: DIRECTORY/NAME/ with manifest.json (checkpoint_manifest.h) and one safetensors file per
// rank, and `latest`, a text file with the newest one's name, which is moved last. Everything is written aside
// (tmp-NAME), fsynced and renamed: whoever dies at any moment leaves a whole checkpoint behind, and what has its name
// is whole. Only one that replaces another of its name comes a moment after that one went. The command's are called
// step-NNNNNNNN; a step that is saved again, by a run that went back, becomes step-NNNNNNNN.2.
//
// Saving is in three parts, so that any number of ranks on one file system can do it without exchanging more than one
// barrier, and from any thread:
//   1. rank 0: begin(), after which it may add files of its own; then a barrier, so that no rank writes before.
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
#include "io/element_order.h"
#include "io/json.h"

namespace coterie {

// Elements [first, first + count) of a logical tensor, contiguous at `data`. All ranks count a tensor's elements in the
// same order.
struct PieceToWrite {
  std::string tensor;
  std::vector<int64_t> shape;  // of the logical tensor
  DType dtype = DType::kF32;   // fp32, bf16 or fp16
  int64_t first = 0;
  int64_t count = 0;  // 0: nothing is written but that the tensor exists
  const void* data = nullptr;
  ElementOrder order = {};
};

class CheckpointDirectory {
 public:
  explicit CheckpointDirectory(std::string path) : path_(std::move(path)) {}

  static std::string step_name(int64_t step);

  // The newest checkpoint's path; nothing when none was ever finished. CorruptFile when `latest` names none.
  std::optional<std::string> latest() const;

  // Clears what saves of steps or of this name that were cut off left behind; no other save may be under way. Returns
  // the path of what is being written. InvalidArgument for a name that can't be a directory's.
  std::string begin(const std::string& name) const;

  void write_shard(const std::string& name, int rank, std::span<const PieceToWrite> pieces) const;

  struct Commit {
    int num_ranks = 1;
    nlohmann::json state = nlohmann::json::object();
    int64_t keep = 2;         // steps that stay: the newest ones; 0: all
    bool replace = false;     // an older one of this name, else this one's name gets a number
    bool latest = true;       // whether `latest` names it
    double timeout_s = 1800;  // for the other ranks' shards; CommError names the rank
  };
  // Returns the checkpoint's path. CorruptFile when the shards together don't cover every tensor once. A stop request
  // ends the wait for other ranks.
  std::string commit(const std::string& name, const Commit& commit, std::stop_token stop = {}) const;

 private:
  std::string aside(const std::string& name) const;
  void prune(int64_t keep, const std::string& latest) const;

  std::string path_;
};

}  // namespace coterie
