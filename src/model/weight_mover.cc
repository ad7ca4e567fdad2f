#include "model/weight_mover.h"

#include <string>
#include <utility>

#include "base/log.h"
#include "coterie/error.h"

namespace coterie {

WeightMover::WeightMover(ModelWeights& weights)
    : weights_(weights), file_(dynamic_cast<FileStore&>(*weights.store).file()), thread_([this] { copy(); }) {}

WeightMover::~WeightMover() {
  stop_ = true;
  if (thread_.joinable()) thread_.join();
}

void WeightMover::copy() {
  try {
    copy_ = file_.copy(stop_);
  } catch (const ResourceExhausted& error) {
    log_info("weights stay in the mapped file: " + std::string(error.what()));
  } catch (...) {
    error_ = std::current_exception();
  }
  ready_ = true;
}

bool WeightMover::move_if_ready() {
  if (!ready_) return false;
  if (thread_.joinable()) thread_.join();
  if (error_) std::rethrow_exception(error_);
  if (copy_.size() == 0) return true;  // there is no memory for it
  // The copy is the file byte by byte.
  const char *const from = file_.start(), *const to = copy_.as<char>();
  const auto moved = [&](const void* data) { return to + (static_cast<const char*>(data) - from); };
  visit_matrices(weights_, [&](PackedMatrix& matrix) {
    if (matrix.data()) matrix.point_to(moved(matrix.data()));
  });
  file_.use(std::move(copy_));
  return true;
}

}  // namespace coterie
