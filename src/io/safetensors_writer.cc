#include <algorithm>

#include "base/check.h"
#include "coterie/error.h"
#include "io/json.h"
#include "io/printable.h"
#include "io/safetensors.h"

namespace coterie {
namespace {

using nlohmann::json;

constexpr size_t kDataAlignment = 64;

size_t byte_count(const std::string& path, const TensorToWrite& tensor) {
  size_t bytes = dtype_size(tensor.dtype);
  for (const int64_t dim : tensor.shape) {
    if (dim < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(dim), &bytes)) {
      throw InvalidArgument(path + ": tensor " + printable(tensor.name) + ": shape: " + std::to_string(dim) +
                            " is negative or too large");
    }
  }
  COTERIE_CHECK(bytes == 0 || tensor.data, "tensor without data: " + tensor.name);
  return bytes;
}

std::string header_text(const std::string& path, const json& header) {
  std::string text;
  try {
    text = header.dump();
  } catch (const json::type_error&) {
    throw InvalidArgument(path + ": a tensor name or the metadata is not UTF-8");
  }
  // Spaces are the padding that the format allows.
  const size_t unpadded = sizeof(uint64_t) + text.size();
  text.append((kDataAlignment - unpadded % kDataAlignment) % kDataAlignment, ' ');
  return text;
}

}  // namespace

const char* safetensors_dtype(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kI8:
      return "I8";
    case DType::kU8:
      return "U8";
    case DType::kI32:
      return "I32";
    case DType::kI64:
      return "I64";
  }
  COTERIE_CHECK(false, "unknown dtype");
}

void write_safetensors(const std::string& path, std::span<const TensorToWrite> tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<const TensorToWrite*> order;
  for (const TensorToWrite& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [](const TensorToWrite* a, const TensorToWrite* b) {
    return dtype_size(a->dtype) > dtype_size(b->dtype);
  });

  json header = json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  size_t end = 0;
  for (const TensorToWrite* tensor : order) {
    if (header.contains(tensor->name) || tensor->name == "__metadata__") {
      throw InvalidArgument(path + ": tensor name " + printable(tensor->name) + " is taken");
    }
    const size_t begin = end;
    end += byte_count(path, *tensor);
    header[tensor->name] = {
        {"dtype", safetensors_dtype(tensor->dtype)}, {"shape", tensor->shape}, {"data_offsets", {begin, end}}};
  }
  const std::string text = header_text(path, header);
  const uint64_t length = text.size();

  AtomicFile file(path);
  file.write(&length, sizeof(length));
  file.write(text.data(), text.size());
  for (const TensorToWrite* tensor : order) file.write(tensor->data, byte_count(path, *tensor));
  file.commit();
}

}  // namespace coterie
