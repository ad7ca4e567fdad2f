// coterie._engine: the engine and everything about model files for Python, with plain types and numpy
// arrays only; no torch. Computation runs with the GIL released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <set>
#include <string>

#include "base/machine.h"
#include "base/thread_pool.h"
#include "bindings/engine_binding.h"
#include "bindings/errors.h"
#include "bindings/numpy.h"
#include "coterie/error.h"
#include "io/checkpoint_source.h"
#include "io/gguf.h"
#include "io/gguf_parts.h"
#include "io/printable.h"
#include "kernels/kernel_table.h"
#include "kernels/limits.h"
#include "model/export.h"
#include "model/quantize.h"
#include "model/stored_model.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace coterie {
namespace {

nb::tuple count_parameters(const std::string& config_json) {
  const ModelConfig config = ModelConfig::from_json(config_json, "model");
  return nb::make_tuple(config.num_parameters(), config.num_active_parameters());
}

nb::list stored_tensors(const std::string& path) {
  nb::list result;
  const std::unique_ptr<TensorSource> source = open_tensors(path);
  for (const StoredTensor& tensor : source->tensors()) {
    nb::dict entry;
    try {
      entry["name"] = nb::cast(tensor.name);
    } catch (const nb::python_error&) {
      throw CorruptFile(path + ": tensor " + printable(tensor.name) + ": a name that is not UTF-8");
    }
    entry["shape"] = tensor.shape;
    entry["dtype"] = tensor.dtype;
    entry["bytes"] = tensor.bytes;
    result.append(entry);
  }
  return result;
}

// What a training checkpoint says of itself beside its tensors; None for another path.
nb::object checkpoint_facts(const std::string& path) {
  if (!CheckpointSource::is_checkpoint(path)) return nb::none();
  const CheckpointSource source(path);
  std::set<std::string> files;
  size_t pieces = 0;
  for (const auto& [name, tensor] : source.manifest().tensors) {
    pieces += tensor.pieces.size();
    for (const CheckpointPiece& piece : tensor.pieces) files.insert(piece.file);
  }
  nb::dict facts;
  facts["state_json"] = source.state().dump();
  facts["files"] = files.size();
  facts["pieces"] = pieces;
  return facts;
}

nb::ndarray<nb::numpy, float> read_tensor(const std::string& path, const std::string& name) {
  const std::unique_ptr<TensorSource> source = open_tensors(path);
  const StoredTensor* tensor = source->find(name);
  if (!tensor) throw InvalidArgument(path + ": " + name + ": no such tensor");
  std::vector<float> values(tensor->num_elements());
  source->read(name, values.data());
  return to_numpy(std::move(values), tensor->shape);
}

nb::dict gguf_metadata(const std::string& path) {
  const GgufSource source(path);
  nb::dict result;
  for (const auto& [key, value] : source.metadata()) {
    try {
      result[key.c_str()] = nb::cast(value);
    } catch (const nb::python_error&) {
      throw CorruptFile(path + ": metadata " + printable(key) + ": text that is not UTF-8");
    }
  }
  return result;
}

// What benches hold their figures against, measured on threads of its own.
class Limits {
 public:
  Limits(int threads, size_t read_bytes) : pool_(threads), memory_(read_bytes) {}

  double register_flops(const std::string& dtype) {
    if (dtype != "fp32" && dtype != "bf16") throw InvalidArgument("dtype: '" + dtype + "' is neither fp32 nor bf16");
    return coterie::register_flops(dtype == "bf16" ? DType::kBF16 : DType::kF32, pool_);
  }
  double read_bandwidth() { return memory_.measure(pool_); }

 private:
  NativeThreadPool pool_;
  ReadBandwidth memory_;
};

nb::dict load_weights_of(const std::string& path) {
  const StoredModel model(path);
  nb::dict result;
  for (const MappedTensor& tensor : model.tensors().tensors()) {
    result[tensor.spec.name.c_str()] = to_numpy(model.tensors().read(tensor.spec.name), tensor.spec.shape);
  }
  return result;
}

void quantize(const std::string& source, const std::string& out_dir, const std::string& dtype,
              const std::string& attention_dtype, const std::string& head_dtype, int threads,
              const nb::callable& progress) {
  const QuantizeProgress show = [&](int64_t done, int64_t total) {
    nb::gil_scoped_acquire acquire;
    progress(done, total);
  };
  nb::gil_scoped_release release;
  NativeThreadPool pool(threads > 0 ? threads : available_cpus());
  quantize_model(source, out_dir, {dtype, attention_dtype, head_dtype}, pool, show);
}

}  // namespace
}  // namespace coterie

NB_MODULE(_engine, m) {
  using namespace coterie;
  const auto no_gil = nb::call_guard<nb::gil_scoped_release>();
  register_exceptions(m);
  bind_engine(m);
  nb::class_<Limits>(m, "Limits")
      .def(nb::init<int, size_t>(), "threads"_a, "read_bytes"_a, no_gil)
      .def("register_flops", &Limits::register_flops, "dtype"_a, no_gil)
      .def("read_bandwidth", &Limits::read_bandwidth, no_gil);
  m.def("model_config", [](const std::string& path) { return read_model_config(path).to_json(); }, "path"_a);
  m.def("count_parameters", &count_parameters, "config_json"_a);
  m.def("stored_tensors", &stored_tensors, "path"_a);
  m.def("checkpoint_facts", &checkpoint_facts, "path"_a);
  m.def("read_tensor", &read_tensor, "path"_a, "name"_a);
  m.def("gguf_metadata", &gguf_metadata, "path"_a);
  m.def("gguf_parts", &gguf_parts, "path"_a);
  m.def("load_weights", &load_weights_of, "path"_a);
  m.def("export_model", &export_model, "source_dir"_a, "out_dir"_a, "architecture"_a = "auto", no_gil);
  m.def("quantize_model", &quantize, "source"_a, "out_dir"_a, "dtype"_a, "attention_dtype"_a, "head_dtype"_a,
        "threads"_a, "progress"_a);
  m.def("isa", [] { return std::string(active_kernels().name); });
}
