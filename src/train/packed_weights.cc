#include "train/packed_weights.h"

#include <atomic>
#include <compare>
#include <map>
#include <mutex>
#include <utility>

#include "coterie/error.h"
#include "kernels/kernel_table.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

int64_t num_matrices(const at::Tensor& weight) { return weight.dim() == 3 ? weight.size(0) : 1; }

ConstMatrix matrix_of(const at::Tensor& weight, int64_t e) {
  return weight.dim() == 3 ? const_matrix(weight, e) : const_matrix(weight);
}

PackedShape shape_of(const at::Tensor& weight, bool gated) {
  return {panel_type(dtype_of(weight)), weight.size(-2), weight.size(-1), gated};
}

bool tries_compact(const PackedShape& shape) { return shape.type == PanelType::kBF16 && active_kernels().compact_pays; }

// Which weight it is, and how it is packed.
struct Key {
  const void* data;
  at::ScalarType dtype;
  bool gated;
  std::vector<int64_t> sizes, strides;

  Key(const at::Tensor& weight, bool is_gated)
      : data(weight.const_data_ptr()),
        dtype(weight.scalar_type()),
        gated(is_gated),
        sizes(weight.sizes().vec()),
        strides(weight.strides().vec()) {}
  auto operator<=>(const Key&) const = default;
};

// What is known of it.
struct Kept {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t version;
  std::shared_ptr<const WeightPanels> panels = nullptr;  // null after a first use

  explicit Kept(const at::Tensor& weight)
      : storage(weight.storage().getWeakStorageImpl()), version(weight._version()) {}

  // Its storage is not forgotten before this is: another one has another address.
  bool is_as(const at::Tensor& weight) const {
    return storage._unsafe_get_target() == weight.storage().unsafeGetStorageImpl() && weight._version() == version;
  }
  // The storage is no more, or elsewhere.
  bool is_dead(const void* data) const {
    const auto alive = storage.lock();
    if (!alive) return true;
    const auto* const start = static_cast<const char*>(alive->data());
    return data < start || data >= start + alive->nbytes();
  }
  size_t bytes() const { return panels ? panels->bytes() : 0; }
};

class PackedWeights {
 public:
  void keep(size_t max_bytes) {
    const std::lock_guard lock(mutex_);
    if (max_bytes == 0) {
      kept_.clear();
      bytes_ = 0;
    }
    max_bytes_ = max_bytes;
  }

  size_t bytes() {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

  std::shared_ptr<const WeightPanels> find(const at::Tensor& weight, bool gated) {
    if (max_bytes_ == 0 || weight.is_inference() || weight.numel() == 0) return nullptr;
    const std::lock_guard lock(mutex_);
    const auto [place, is_new] = kept_.try_emplace(Key(weight, gated), weight);
    Kept& kept = place->second;
    if (is_new) {
      forget_dead();
    } else if (!kept.is_as(weight)) {
      bytes_ -= kept.bytes();
      kept = Kept(weight);
    } else if (!kept.panels && has_room(WeightPanels::most_bytes(weight, gated))) {
      kept.panels = pack(weight, gated);
      bytes_ += kept.bytes();
    }
    return kept.panels;
  }

 private:
  bool has_room(size_t bytes) {
    if (bytes_ + bytes > max_bytes_) forget_dead();
    return bytes_ + bytes <= max_bytes_;
  }

  void forget_dead() {
    std::erase_if(kept_, [this](const auto& entry) {
      const auto& [key, kept] = entry;
      const bool dead = kept.is_dead(key.data);
      if (dead) bytes_ -= kept.bytes();
      return dead;
    });
  }

  static std::shared_ptr<const WeightPanels> pack(const at::Tensor& weight, bool gated) {
    try {
      return std::make_shared<const WeightPanels>(weight, gated, torch_pool());
    } catch (const ResourceExhausted&) {
      return nullptr;  // it works without
    }
  }

  std::mutex mutex_;
  std::map<Key, Kept> kept_;
  std::atomic<size_t> max_bytes_ = 0;
  size_t bytes_ = 0;
};

// Never destroyed: torch may be in use until the very end.
PackedWeights& packed_weights() {
  static PackedWeights* const weights = new PackedWeights;
  return *weights;
}

}  // namespace

WeightPanels::WeightPanels(const at::Tensor& weight, bool gated, ThreadPool& pool) {
  PackedShape shape = shape_of(weight, gated);
  shape.compact = tries_compact(shape);
  if (pack(weight, shape, pool)) return;
  memory_ = {};
  shape.compact = false;
  pack(weight, shape, pool);
}

size_t WeightPanels::most_bytes(const at::Tensor& weight, bool gated) {
  const PackedShape shape = shape_of(weight, gated);
  return static_cast<size_t>(num_matrices(weight) + tries_compact(shape)) * shape.bytes();
}

// Fails where a matrix cannot be compact.
bool WeightPanels::pack(const at::Tensor& weight, const PackedShape& shape, ThreadPool& pool) {
  const int64_t E = num_matrices(weight);
  memory_ = AlignedBuffer(static_cast<size_t>(E) * shape.bytes());
  matrices_.clear();
  PackedShape plain_shape = shape;
  plain_shape.compact = false;
  AlignedBuffer plain_memory(shape.compact ? plain_shape.bytes() : 0);
  for (int64_t e = 0; e < E; ++e) {
    char* const start = memory_.as<char>() + static_cast<size_t>(e) * shape.bytes();
    AlignedBuffer own = AlignedBuffer::borrowed(start, shape.bytes());
    if (!shape.compact) {
      matrices_.emplace_back(shape, matrix_of(weight, e), pool, std::move(own));
      continue;
    }
    AlignedBuffer borrowed = AlignedBuffer::borrowed(plain_memory.data(), plain_memory.size());
    const PackedMatrix plain(plain_shape, matrix_of(weight, e), pool, std::move(borrowed));
    std::optional<PackedMatrix> compact = plain.compacted(pool, std::move(own));
    if (!compact) return false;
    matrices_.push_back(std::move(*compact));
  }
  return true;
}

void keep_packed_weights(size_t max_bytes) { packed_weights().keep(max_bytes); }

size_t packed_weight_bytes() { return packed_weights().bytes(); }

std::shared_ptr<const WeightPanels> packed_weight(const at::Tensor& weight, bool gated) {
  return packed_weights().find(weight, gated);
}

}  // namespace coterie
