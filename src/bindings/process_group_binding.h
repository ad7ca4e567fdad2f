// ProcessGroup for Python: what start-up and tests need. Arrays are C-contiguous and in CPU memory; numpy has no
// bfloat16, so uint16 stands for its bits.
#pragma once

#include <nanobind/nanobind.h>

namespace coterie {

void bind_process_group(nanobind::module_& m);

}  // namespace coterie
