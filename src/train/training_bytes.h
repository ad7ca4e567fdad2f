// What training holds on one rank beside activations, in bytes.
#pragma once

#include <cstdint>

namespace coterie {

struct TrainingBytes {
  int64_t weights = 0;
  int64_t gradients = 0;  // at their peak, where nothing else is said
  int64_t masters = 0;    // fp32 copies; none of fp32 weights, which are their own
  int64_t moments = 0;    // both of AdamW's

  bool operator==(const TrainingBytes&) const = default;
};

}  // namespace coterie
