// A run's checkpoints (io/checkpoint_directory.h) of what the optimizer holds: written in the background while training
// goes on, and read back into any layout of ranks.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "io/checkpoint_directory.h"
#include "io/checkpoint_source.h"
#include "model/config.h"
#include "train/settings.h"
#include "train/state_view.h"

namespace coterie {

class ProcessGroup;

// What a rank writes of its views. The values stay where they are.
std::vector<PieceToWrite> pieces_of(const std::vector<StateView>& views);

// Reads the views from a checkpoint, whatever layout wrote it. Every rank of the group (null: one) calls it.
// InvalidArgument when the views of all ranks together aren't each of its logical tensors once, naming the tensor;
// tensors that nobody wants are left alone when their names begin with `unwanted`.
void load_views(const CheckpointSource& source, const std::vector<StateView>& views, ProcessGroup* group,
                const std::optional<std::string>& unwanted = std::nullopt);

// Where a run stands. Data order and random choices follow from `step` and the settings alone.
struct TrainState {
  int64_t step = 0;          // finished optimizer steps
  double train_seconds = 0;  // spent in steps, all sittings together
};

// Saves one checkpoint at a time from a thread of its own. It copies what it saves first, so the tensors may change as
// soon as start() returns. All methods are called by one thread, start() by all ranks of the group alike; the
// background threads of the ranks meet in the file system alone, since a group belongs to one thread.
class CheckpointSaver {
 public:
  // The group, null for one rank, outlives the saver.
  CheckpointSaver(const ModelConfig& config, const RunSettings& settings, ProcessGroup* group = nullptr);
  ~CheckpointSaver();  // waits; a failure is lost

  // Waits for the save before, whose failure it throws.
  void start(const TrainState& state, const std::vector<StateView>& views);
  // Throws what the background met, once; doesn't wait.
  void check();
  // Waits until what was started is safe, and throws what went wrong. Returns the newest checkpoint's path, on rank 0;
  // empty on other ranks, which only know of their own part.
  std::string finish();

 private:
  struct Snapshot;
  void write(const Snapshot& snapshot, std::stop_token stop);

  CheckpointDirectory directory_;
  std::string config_json_;
  RunSettings settings_;
  ProcessGroup* group_;
  std::string last_path_;
  std::exception_ptr failure_;  // of the thread, set before `done_`
  std::atomic<bool> done_ = true;
  std::jthread thread_;  // last: it uses the others
};

// The newest checkpoint of settings.train.output_dir. InvalidArgument when there is none.
std::string latest_checkpoint(const RunSettings& settings);

// Loads the newest checkpoint of settings.train.output_dir into the views, whatever layout wrote it; nothing when there
// is none. Every rank of the group calls it. InvalidArgument when it is of another model, seed or data order, or as
// load_views(); CorruptFile when it is damaged.
std::optional<TrainState> load_latest_checkpoint(const ModelConfig& config, const RunSettings& settings,
                                                 const std::vector<StateView>& views, ProcessGroup* group = nullptr);

}  // namespace coterie
