# coterie_library(NAME DEPENDS ...): the static library coterie_NAME from src/NAME/*.cc, and,
# when tests are built, one CTest program NAME_tests from src/NAME/*_test.cc. Files are found by
# name, so adding a file to a folder needs no edit here. Warnings are errors in our own code; fields that
# a designated initializer leaves out are meant to keep their defaults.
function(coterie_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Werror -Wno-psabi -Wno-missing-field-initializers)
endfunction()

function(coterie_library name)
  cmake_parse_arguments(ARG "" "" "DEPENDS" ${ARGN})
  set(folder ${PROJECT_SOURCE_DIR}/src/${name})
  file(GLOB sources CONFIGURE_DEPENDS ${folder}/*.cc)
  set(tests ${sources})
  list(FILTER sources EXCLUDE REGEX "_test\\.cc$")
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")
  if(NOT sources)
    message(FATAL_ERROR "src/${name} holds no sources")
  endif()
  add_library(coterie_${name} STATIC ${sources})
  target_include_directories(coterie_${name} PUBLIC ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
  target_link_libraries(coterie_${name} PUBLIC ${ARG_DEPENDS})
  coterie_warnings(coterie_${name})
  if(COTERIE_BUILD_TESTS AND tests)
    add_executable(${name}_tests ${tests})
    target_link_libraries(${name}_tests PRIVATE coterie_${name} GTest::gtest GTest::gtest_main)
    coterie_warnings(${name}_tests)
    add_test(NAME ${name} COMMAND ${name}_tests WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
    # torch's threads sleep rather than spin, so that a busy machine does not stretch the tests.
    set_tests_properties(${name} PROPERTIES ENVIRONMENT OMP_WAIT_POLICY=passive)
  endif()
endfunction()
