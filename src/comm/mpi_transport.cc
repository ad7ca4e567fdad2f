#include "comm/mpi_transport.h"

#include <dlfcn.h>

#include "comm/mpi/factory.h"
#include "coterie/error.h"

namespace coterie {

std::unique_ptr<Transport> open_mpi_transport(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* symbol = handle ? dlsym(handle, kMpiFactory) : nullptr;
  if (!symbol) {
    const char* reason = dlerror();
    throw InvalidArgument("MPI: " + std::string(reason ? reason : library + " has no factory"));
  }
  char error[512] = "";
  Transport* transport = reinterpret_cast<MpiFactory*>(symbol)(error, sizeof error);
  if (!transport) throw InvalidArgument("MPI: " + std::string(error));
  return std::unique_ptr<Transport>(transport);
}

}  // namespace coterie
