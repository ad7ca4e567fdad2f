// coterie._engine.Engine and what it takes and gives.
#pragma once

#include <nanobind/nanobind.h>

namespace coterie {

void bind_engine(nanobind::module_& m);

}  // namespace coterie
