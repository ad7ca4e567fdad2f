// safetensors files (https://github.com/huggingface/safetensors): 8 bytes header length, a JSON
// header, tensor bytes. Hostile files end in CorruptFile naming file, field and value: the header is
// capped at 100 MB, every range must lie in the file and hold shape * dtype bytes, and the ranges
// must cover the data without holes or overlap. Names are unique; a dtype that is not the format's own
// is refused. Reading to fp32 knows F32, F16 and BF16; raw() gives the others.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "io/atomic_file.h"
#include "io/tensor_source.h"

namespace coterie {

// One file, or all shards that a directory's model.safetensors.index.json lists. The index and the
// shards must agree on where every tensor lies; a shard's name is a plain file name beside the index.
class SafetensorsSource : public TensorSource {
 public:
  // path: a .safetensors file, an index file, or a directory that holds model.safetensors or
  // model.safetensors.index.json.
  explicit SafetensorsSource(const std::string& path);
  ~SafetensorsSource() override;

  const std::string& path() const override;
  const std::vector<StoredTensor>& tensors() const override;
  const StoredTensor* find(const std::string& name) const override;
  void read(const std::string& name, float* out) const override;
  void check_readable(const std::string& name) const override;

  // The bytes as they lie in the mapped file (no alignment promised).
  std::span<const std::byte> raw(const std::string& name) const;
  std::vector<uint8_t> bytes(const std::string& name) const;   // a copy of them
  const std::map<std::string, std::string>& metadata() const;  // __metadata__ of the first file

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The format's name of a dtype ("F32"), and the dtype of a name that can be read to fp32.
const char* safetensors_dtype(DType dtype);
std::optional<DType> readable_dtype(const std::string& name);

struct TensorToWrite {
  std::string name;
  std::vector<int64_t> shape;
  DType dtype = DType::kF32;
  const void* data = nullptr;  // contiguous
};

// Written through AtomicFile. The data begins at a multiple of 64 bytes; tensors lie in the order
// given, those of wider dtypes first, so that every element is aligned. InvalidArgument for a name
// that occurs twice or is not UTF-8, ResourceExhausted when the disk is full.
void write_safetensors(const std::string& path, std::span<const TensorToWrite> tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace coterie
