# The headers and libraries inside the installed torch wheel, as the target coterie_torch.
# torch's own find_package needs a CUDA toolkit when the wheel is a CUDA build; we link the CPU
# library directly. The wheel is located without importing it.
set(COTERIE_TORCH_FOUND FALSE)
if(COTERIE_TRAIN)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(torch_dir AND EXISTS ${torch_dir}/lib/libtorch_cpu.so)
    set(COTERIE_TORCH_FOUND TRUE)
    add_library(coterie_torch INTERFACE)
    target_include_directories(coterie_torch SYSTEM INTERFACE
      ${torch_dir}/include ${torch_dir}/include/torch/csrc/api/include)
    target_link_libraries(coterie_torch INTERFACE
      ${torch_dir}/lib/libtorch_cpu.so ${torch_dir}/lib/libc10.so)
    # at::parallel_for is a header: without OpenMP it silently runs on one thread. Only torch's own
    # copy of the runtime knows torch's threads.
    file(GLOB torch_openmp ${torch_dir}/lib/libgomp*.so*)
    if(NOT torch_openmp)  # a torch that was built to use the system's
      find_package(OpenMP REQUIRED COMPONENTS CXX)
      set(torch_openmp OpenMP::OpenMP_CXX)
    endif()
    target_compile_options(coterie_torch INTERFACE -fopenmp)
    target_link_libraries(coterie_torch INTERFACE ${torch_openmp})
    target_link_options(coterie_torch INTERFACE "LINKER:--no-as-needed")
    # Python's tensors, for the extension module alone.
    add_library(coterie_torch_python INTERFACE)
    target_link_libraries(coterie_torch_python INTERFACE coterie_torch ${torch_dir}/lib/libtorch_python.so)
    # In the build tree CMake finds the libraries by their full path; in a wheel coterie/ and torch/ are
    # neighbours in site-packages.
    set(CMAKE_INSTALL_RPATH "$ORIGIN/../torch/lib")
  elseif(NOT COTERIE_TRAIN STREQUAL "AUTO")
    message(FATAL_ERROR "COTERIE_TRAIN=${COTERIE_TRAIN}, but ${Python_EXECUTABLE} has no torch: pip install torch")
  endif()
endif()
message(STATUS "coterie: training half ${COTERIE_TORCH_FOUND} ${torch_dir}")
