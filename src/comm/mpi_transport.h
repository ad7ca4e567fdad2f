// MPI as a transport. The code that calls MPI is the library libcoterie_mpi.so (src/comm/mpi), which is loaded when
// somebody asks for it: a machine without MPI then has everything else, and no module of ours needs libmpi.so to start.
#pragma once

#include <memory>
#include <string>

#include "comm/transport.h"

namespace coterie {

// All processes of the job (MPI_COMM_WORLD). MPI is initialized with MPI_THREAD_SERIALIZED, unless it is already with
// at least that. `library`: the path of libcoterie_mpi.so. InvalidArgument when it can't be loaded (MPI is not
// installed) or MPI refuses; once per process.
std::unique_ptr<Transport> open_mpi_transport(const std::string& library);

}  // namespace coterie
