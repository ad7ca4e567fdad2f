#include "bindings/process_group_binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <vector>

#include "comm/agreement.h"
#include "comm/measure.h"
#include "comm/mpi_transport.h"
#include "comm/process_group.h"
#include "comm/thread_transport.h"
#include "coterie/error.h"

namespace coterie {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

using Array = nb::ndarray<nb::c_contig, nb::device::cpu>;
using Release = nb::gil_scoped_release;

DType dtype_of(const Array& array) {
  if (array.dtype() == nb::dtype<float>()) return DType::kF32;
  if (array.dtype() == nb::dtype<uint16_t>()) return DType::kBF16;
  if (array.dtype() == nb::dtype<int64_t>()) return DType::kI64;
  throw InvalidArgument("array: its dtype is not float32, uint16 (bfloat16) or int64");
}

ReduceOp op_of(const std::string& name) {
  if (name == "sum") return ReduceOp::kSum;
  if (name == "max") return ReduceOp::kMax;
  throw InvalidArgument("op: '" + name + "' is not sum or max");
}

void require(bool condition, const char* what) {
  if (!condition) throw InvalidArgument(what);
}

void all_reduce(ProcessGroup& group, const Array& array, const std::string& op, const std::string& label) {
  const DType dtype = dtype_of(array);
  const ReduceOp reduce_op = op_of(op);
  const Release release;
  group.all_reduce(array.data(), static_cast<int64_t>(array.size()), dtype, reduce_op, label);
}

void reduce_scatter(ProcessGroup& group, const Array& input, const Array& output, const std::string& op,
                    const std::string& label) {
  const DType dtype = dtype_of(input);
  const ReduceOp reduce_op = op_of(op);
  require(dtype_of(output) == dtype && input.size() == output.size() * static_cast<size_t>(group.size()),
          "output: not a rank's share of input");
  const Release release;
  group.reduce_scatter(input.data(), output.data(), static_cast<int64_t>(output.size()), dtype, reduce_op, label);
}

void all_gather(ProcessGroup& group, const Array& input, const Array& output, const std::string& label) {
  require(output.nbytes() == input.nbytes() * static_cast<size_t>(group.size()), "output: not a place for every rank");
  const Release release;
  group.all_gather(input.data(), output.data(), static_cast<int64_t>(input.nbytes()), label);
}

using Counts = std::vector<int64_t>;

// Blocks lie one behind the other; returns how many bytes they are.
int64_t offsets_of(const Counts& counts, Counts& offsets) {
  int64_t total = 0;
  for (const int64_t count : counts) {
    require(count >= 0, "counts: negative");
    offsets.push_back(total);
    total += count;
  }
  return total;
}

void all_to_all_v(ProcessGroup& group, const Array& input, const Counts& send_bytes, const Array& output,
                  const Counts& receive_bytes, const std::string& label) {
  Counts send_offsets, receive_offsets;
  require(offsets_of(send_bytes, send_offsets) == static_cast<int64_t>(input.nbytes()), "send_bytes: not all of input");
  require(offsets_of(receive_bytes, receive_offsets) == static_cast<int64_t>(output.nbytes()),
          "receive_bytes: not all of output");
  const Release release;
  group.all_to_all_v({input.data(), send_bytes, send_offsets, output.data(), receive_bytes, receive_offsets}, label);
}

void broadcast(ProcessGroup& group, const Array& array, int root, const std::string& label) {
  const Release release;
  group.broadcast(array.data(), static_cast<int64_t>(array.nbytes()), root, label);
}

}  // namespace

void bind_process_group(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<ProcessGroup>(m, "ProcessGroup")
      .def_prop_ro("rank", &ProcessGroup::rank)
      .def_prop_ro("size", &ProcessGroup::size)
      .def_prop_ro("name", &ProcessGroup::name)
      .def_prop_ro("backend", [](const ProcessGroup& group) { return std::string(group.backend()); })
      .def_prop_ro("timeout_s", &ProcessGroup::timeout_s)
      .def("world_rank", &ProcessGroup::world_rank, "rank"_a)
      .def("all_reduce", &all_reduce, "array"_a, "op"_a = "sum", "label"_a = "")
      .def("reduce_scatter", &reduce_scatter, "input"_a, "output"_a, "op"_a = "sum", "label"_a = "")
      .def("all_gather", &all_gather, "input"_a, "output"_a, "label"_a = "")
      .def("all_to_all_v", &all_to_all_v, "input"_a, "send_bytes"_a, "output"_a, "receive_bytes"_a, "label"_a = "")
      .def("broadcast", &broadcast, "array"_a, "root"_a = 0, "label"_a = "")
      .def(
          "barrier", [](ProcessGroup& group, const std::string& label) { group.barrier(label); }, "label"_a = "",
          Unlocked())
      .def("split", &ProcessGroup::split, "color"_a, "key"_a, "name"_a, Unlocked())
      .def(
          "subgroup",
          [](ProcessGroup& group, const std::vector<int>& ranks, const std::string& name) {
            return group.subgroup(ranks, name);
          },
          "ranks"_a, "name"_a, Unlocked())
      .def(
          "require_same",
          [](ProcessGroup& group, const std::string& text, const std::string& what) {
            require_same(group, text, what);
          },
          "text"_a, "what"_a, Unlocked())
      .def("measure", &measure_operation, "operation"_a, "bytes"_a, "rounds"_a, Unlocked())
      .def("finish", &ProcessGroup::finish, Unlocked());
  m.def(
      "mpi_process_group",
      [](const std::string& library, double timeout_s) {
        return std::make_unique<ProcessGroup>(open_mpi_transport(library), timeout_s);
      },
      "library"_a, "timeout_s"_a, Unlocked());
  m.def(
      "single_process_group",
      [](double timeout_s) {
        return std::make_unique<ProcessGroup>(std::move(make_thread_transports(1).front()), timeout_s);
      },
      "timeout_s"_a);
}

}  // namespace coterie
