// The one symbol of libcoterie_mpi.so.
#pragma once

#include <cstddef>

namespace coterie {

class Transport;

inline constexpr char kMpiFactory[] = "coterie_open_mpi_transport";

// A transport that the caller deletes; nullptr with a reason in `error` (of that size) when there is none.
using MpiFactory = Transport*(char* error, size_t error_size);

}  // namespace coterie
