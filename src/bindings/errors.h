// The exceptions of coterie/error.h in Python. coterie._engine owns the classes; every other module
// shows the same ones, and nanobind translates for all modules through one registry.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "coterie/error.h"

namespace coterie {

inline void register_exceptions(nanobind::module_& m) {
  namespace nb = nanobind;
  const std::string owner = "coterie._engine";
  if (nb::cast<std::string>(m.attr("__name__")) == owner) {
    // Bad input is a ValueError to Python code that knows nothing of us.
    nb::exception<InvalidArgument>(m, "InvalidArgument", PyExc_ValueError);
    nb::exception<CorruptFile>(m, "CorruptFile", PyExc_ValueError);
    nb::exception<ResourceExhausted>(m, "ResourceExhausted", PyExc_RuntimeError);
    nb::exception<CommError>(m, "CommError", PyExc_RuntimeError);
    return;
  }
  const nb::module_ shared = nb::module_::import_(owner.c_str());
  for (const char* name : {"InvalidArgument", "CorruptFile", "ResourceExhausted", "CommError"}) {
    m.attr(name) = shared.attr(name);
  }
}

}  // namespace coterie
