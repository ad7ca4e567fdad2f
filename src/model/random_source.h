// A model's tensors without a file: random numbers in the shapes that its configuration asks for. For benchmarks of
// shapes that nobody has trained; equal configurations give equal weights.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "io/tensor_source.h"
#include "model/checkpoint_map.h"

namespace coterie {

// Weights of norms are one and biases zero. Matrices are normal around zero with a deviation of in^-0.5, which keeps
// the size of what they multiply; long ones repeat a block of numbers, whose length is prime, so that no two of their
// rows are alike.
class RandomSource : public TensorSource {
 public:
  // path: for messages. map: of an architecture; of its forms the first is taken.
  RandomSource(std::string path, const CheckpointMap& map);

  const std::string& path() const override { return path_; }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  const StoredTensor* find(const std::string& name) const override;
  void read(const std::string& name, float* out) const override;

 private:
  struct Values {
    float constant = 0.0f;
    float deviation = 0.0f;  // 0: all are `constant`
  };
  static Values values_of(const TensorSpec& spec);

  std::string path_;
  std::vector<StoredTensor> tensors_;
  std::vector<Values> values_;           // [tensors]
  std::map<std::string, size_t> index_;  // of a name in both
  std::vector<float> block_;
};

}  // namespace coterie
