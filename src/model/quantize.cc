#include "model/quantize.h"

#include <algorithm>
#include <filesystem>
#include <utility>
#include <vector>

#include "coterie/error.h"
#include "io/atomic_file.h"
#include "io/safetensors.h"
#include "kernels/quantized.h"
#include "model/architectures.h"
#include "model/quantized_source.h"
#include "model/stored_model.h"
#include "model/tensors.h"

namespace coterie {
namespace {

namespace fs = std::filesystem;

std::vector<char> bytes_of(const void* data, size_t size) {
  const auto* start = static_cast<const char*>(data);
  return {start, start + size};
}

// What a file is called until all of them are written.
constexpr char kPart[] = "coterie-part-";

// The files of a checkpoint, each of about shard_bytes. Without commit() none is left behind.
class ShardWriter {
 public:
  ShardWriter(const std::string& directory, size_t shard_bytes) : directory_(directory), shard_bytes_(shard_bytes) {}
  ~ShardWriter() {
    std::error_code ignored;
    for (size_t i = 0; i < shards_.size(); ++i) fs::remove(directory_ / temporary(i), ignored);
  }
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  void add(const std::string& name, std::vector<int64_t> shape, DType dtype, std::vector<char> bytes) {
    if (used_ > 0 && used_ + bytes.size() > shard_bytes_) write();
    used_ += bytes.size();
    tensors_.push_back({name, std::move(shape), dtype, std::move(bytes)});
  }

  // Names the files as transformers does, and writes their index where there are several.
  void commit() {
    if (!tensors_.empty()) write();
    Json map = Json::object();
    for (size_t i = 0; i < shards_.size(); ++i) {
      const std::string name = shards_.size() == 1 ? "model.safetensors" : numbered(i + 1, shards_.size());
      fs::rename(directory_ / temporary(i), directory_ / name);
      for (const std::string& tensor : shards_[i]) map[tensor] = name;
    }
    if (shards_.size() == 1) return;
    const Json index = {{"metadata", {{"total_size", total_}}}, {"weight_map", map}};
    write_text_file((directory_ / "model.safetensors.index.json").string(), index.dump(2) + "\n");
  }

 private:
  struct Tensor {
    std::string name;
    std::vector<int64_t> shape;
    DType dtype;
    std::vector<char> bytes;
  };

  static std::string temporary(size_t shard) { return kPart + std::to_string(shard) + ".safetensors"; }
  static std::string numbered(size_t number, size_t count) {
    const auto digits = [](size_t n) { return std::string(5 - std::min<size_t>(5, std::to_string(n).size()), '0'); };
    return "model-" + digits(number) + std::to_string(number) + "-of-" + digits(count) + std::to_string(count) +
           ".safetensors";
  }

  void write() {
    std::vector<TensorToWrite> out;
    std::vector<std::string> names;
    for (const Tensor& tensor : tensors_) {
      out.push_back({tensor.name, tensor.shape, tensor.dtype, tensor.bytes.data()});
      names.push_back(tensor.name);
    }
    write_safetensors((directory_ / temporary(shards_.size())).string(), out, {{"format", "pt"}});
    shards_.push_back(std::move(names));
    total_ += std::exchange(used_, 0);
    tensors_.clear();
  }

  fs::path directory_;
  size_t shard_bytes_;
  std::vector<Tensor> tensors_;  // of the next file
  size_t used_ = 0, total_ = 0;
  std::vector<std::vector<std::string>> shards_;  // names of tensors
};

class TensorEncoder {
 public:
  TensorEncoder(const LogicalReader& reader, const WeightTypes& types, ThreadPool& pool, ShardWriter& out)
      : reader_(reader), types_(types), pool_(pool), out_(out) {}

  void encode(const TensorSpec& spec) const {
    const PanelType type = type_of_tensor(types_, spec.name);
    if (is_quantized(type) && reader_.codes_type(spec.name) == codes_name(PanelType::kMxfp4)) {
      if (const std::optional<CodedTensor> stored = reader_.read_codes(spec.name)) return add_mxfp4(spec, *stored);
    }
    const std::vector<float> values = reader_.read(spec.name);
    if (is_quantized(type)) {
      const int64_t cols = spec.shape.back();
      add_matrix(spec, QuantizedMatrix(row_major(values.data(), spec.num_elements() / cols, cols), type, pool_).view());
    } else {
      add_plain(spec, values, type);
    }
  }

 private:
  void add_matrix(const TensorSpec& spec, const QuantizedView& m) const {
    std::vector<int64_t> codes = spec.shape, groups = spec.shape;
    codes.back() = m.row_words() * 4;
    groups.back() = m.groups();
    const auto num_groups = static_cast<size_t>(m.rows * m.groups());
    out_.add(spec.name + "_codes", codes, DType::kU8, bytes_of(m.codes, m.rows * m.row_words() * sizeof(uint32_t)));
    if (!m.row_factors) {
      return out_.add(spec.name + "_scales", groups, DType::kBF16, bytes_of(m.scales, num_groups * sizeof(BFloat16)));
    }
    std::vector<int64_t> factors = spec.shape;
    factors.back() = 1;
    out_.add(spec.name + "_scales", groups, DType::kU8, bytes_of(m.scale_codes, num_groups));
    out_.add(spec.name + "_minimums", groups, DType::kI8, bytes_of(m.minimum_codes, num_groups));
    out_.add(spec.name + "_factors", factors, DType::kF32, bytes_of(m.row_factors, m.rows * sizeof(float)));
  }

  void add_mxfp4(const TensorSpec& spec, const CodedTensor& tensor) const {
    std::vector<int64_t> scales = spec.shape;
    scales.back() /= 32;
    std::vector<int64_t> blocks = scales;
    blocks.push_back(16);
    out_.add(spec.name + "_blocks", blocks, DType::kU8, bytes_of(tensor.codes.data(), tensor.codes.size()));
    out_.add(spec.name + "_scales", scales, DType::kU8, bytes_of(tensor.scales.data(), tensor.scales.size()));
  }

  void add_plain(const TensorSpec& spec, const std::vector<float>& values, PanelType type) const {
    const bool fits = std::ranges::all_of(values, [](float v) { return to_float(to_bfloat16(v)) == v; });
    const DType dtype = type == PanelType::kBF16 || fits ? DType::kBF16 : DType::kF32;
    std::vector<char> bytes(values.size() * dtype_size(dtype));
    convert_from_float(values.data(), dtype, bytes.data(), values.size());
    out_.add(spec.name, spec.shape, dtype, std::move(bytes));
  }

  const LogicalReader& reader_;
  const WeightTypes& types_;
  ThreadPool& pool_;
  ShardWriter& out_;
};

WeightTypes checked_types(const QuantizeOptions& options) {
  for (const char* known : {"int8", "int4", "int4_64"}) {
    if (options.dtype == known) return weight_types(options.dtype, options.attention_dtype, options.head_dtype);
  }
  throw InvalidArgument("dtype: '" + options.dtype + "' is not one of int8, int4, int4_64");
}

// Refuses a directory with a model in it; the parts of one that was killed in the making are in nobody's way.
void make_directory(const fs::path& directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) throw InvalidArgument(directory.string() + ": cannot be made: " + error.message());
  for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name != "config.json" && entry.path().extension() != ".safetensors") continue;
    if (name.starts_with(kPart)) {
      fs::remove(entry.path());
      continue;
    }
    throw InvalidArgument(directory.string() + ": holds a model already: " + name);
  }
}

Json config_json(const ModelConfig& config, const WeightTypes& types) {
  Json json = kCoterieArchitecture.write_config(config);
  json["dtype"] = json["torch_dtype"] = "bfloat16";
  json["quantization_config"] = {{"quant_method", "coterie"},
                                 {"dtype", panel_type_name(types.experts)},
                                 {"attention_dtype", panel_type_name(types.attention)},
                                 {"head_dtype", panel_type_name(types.head)}};
  return json;
}

}  // namespace

void quantize_model(const std::string& source, const std::string& out_dir, const QuantizeOptions& options,
                    ThreadPool& pool, const QuantizeProgress& progress) {
  const WeightTypes types = checked_types(options);
  const StoredModel model(source);
  make_directory(out_dir);
  const std::vector<TensorSpec> tensors = logical_tensors(model.config());
  int64_t done = 0, total = 0;
  for (const TensorSpec& spec : tensors) total += spec.num_elements();
  ShardWriter out(out_dir, options.shard_bytes);
  const TensorEncoder encoder(model.tensors(), types, pool, out);
  for (const TensorSpec& spec : tensors) {
    encoder.encode(spec);
    done += spec.num_elements();
    if (progress) progress(done, total);
  }
  out.commit();
  write_text_file((fs::path(out_dir) / "config.json").string(), config_json(model.config(), types).dump(2) + "\n");
}

}  // namespace coterie
