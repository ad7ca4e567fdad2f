// Vectors as numpy arrays.
#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace coterie {

// A numpy array that owns the vector's memory.
template <typename T>
nanobind::ndarray<nanobind::numpy, T> to_numpy(std::vector<T> values, const std::vector<int64_t>& shape) {
  auto* owner = new std::vector<T>(std::move(values));
  nanobind::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  const std::vector<size_t> dims(shape.begin(), shape.end());
  return nanobind::ndarray<nanobind::numpy, T>(owner->data(), dims.size(), dims.data(), capsule);
}

}  // namespace coterie
