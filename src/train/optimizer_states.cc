#include "train/optimizer_states.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "coterie/error.h"

namespace coterie {
namespace {

[[noreturn]] void refuse(const std::string& directory) {
  throw InvalidArgument("parallel.offload_optimizer: " + directory + ": " + std::strerror(errno));
}

// The blocks are reserved now, so that a full disk is met here and not as a signal in the middle of a step.
void* map_scratch_file(const std::string& directory, int64_t bytes) {
  std::string path = directory + "/coterie-states-XXXXXX";
  const int file = ::mkostemp(path.data(), O_CLOEXEC);
  if (file < 0) refuse(directory);
  ::unlink(path.c_str());
  const int error = ::posix_fallocate(file, 0, bytes);
  void* const data = error == 0
                         ? ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
                         : MAP_FAILED;
  if (error != 0) errno = error;
  const int reason = errno;
  ::close(file);
  errno = reason;
  if (data == MAP_FAILED) refuse(directory);
  return data;
}

}  // namespace

at::Tensor make_state(int64_t count, at::ScalarType dtype, const std::string& offload_path) {
  if (offload_path.empty() || count == 0) return at::zeros({count}, dtype);
  const auto bytes = count * static_cast<int64_t>(c10::elementSize(dtype));
  const auto unmap = [bytes](void* data) { ::munmap(data, static_cast<size_t>(bytes)); };
  return at::from_blob(map_scratch_file(offload_path, bytes), {count}, unmap, dtype);
}

void adamw_row_bf16_moments(AdamWRow row, BFloat16* exp_avg, BFloat16* exp_avg_sq, uint32_t key) {
  static thread_local std::vector<float> widened;
  const auto size = static_cast<size_t>(row.n);
  if (widened.size() < 2 * size) widened.resize(2 * size);
  row.exp_avg = widened.data();
  row.exp_avg_sq = widened.data() + size;
  const KernelTable& kernels = active_kernels();
  kernels.convert_row(exp_avg, DType::kBF16, row.exp_avg, DType::kF32, row.n);
  kernels.convert_row(exp_avg_sq, DType::kBF16, row.exp_avg_sq, DType::kF32, row.n);
  kernels.adamw_row(row);
  kernels.round_randomly_row(row.exp_avg, key, exp_avg, row.n);
  kernels.round_randomly_row(row.exp_avg_sq, ~key, exp_avg_sq, row.n);
}

}  // namespace coterie
