// The ThreadPool that borrows torch's threads (OpenMP), so that our kernels and ATen's ops share one
// set of threads. at::set_num_threads decides how many; call it before training starts.
#pragma once

#include "base/thread_pool.h"

namespace coterie {

ThreadPool& torch_pool();

}  // namespace coterie
