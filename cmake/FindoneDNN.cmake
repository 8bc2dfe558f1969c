# The target oneDNN::oneDNN: the library `dnnl` with its C++ headers. oneDNN's own CMake package is not asked, because
# Debian's demands OpenCL, which nothing here uses.
find_path(oneDNN_INCLUDE_DIR oneapi/dnnl/dnnl.hpp)
find_library(oneDNN_LIBRARY dnnl)
mark_as_advanced(oneDNN_INCLUDE_DIR oneDNN_LIBRARY)

if(oneDNN_INCLUDE_DIR)
  set(version_file "${oneDNN_INCLUDE_DIR}/oneapi/dnnl/dnnl_version.h")
  set(oneDNN_VERSION "")
  foreach(part MAJOR MINOR PATCH)
    file(STRINGS "${version_file}" line REGEX "^#define DNNL_VERSION_${part} [0-9]+")
    string(REGEX REPLACE ".* ([0-9]+).*" "\\1" number "${line}")
    list(APPEND oneDNN_VERSION ${number})
  endforeach()
  string(REPLACE ";" "." oneDNN_VERSION "${oneDNN_VERSION}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(oneDNN REQUIRED_VARS oneDNN_LIBRARY oneDNN_INCLUDE_DIR VERSION_VAR oneDNN_VERSION
  HANDLE_VERSION_RANGE)

if(oneDNN_FOUND AND NOT TARGET oneDNN::oneDNN)
  add_library(oneDNN::oneDNN UNKNOWN IMPORTED)
  set_target_properties(oneDNN::oneDNN PROPERTIES
    IMPORTED_LOCATION "${oneDNN_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${oneDNN_INCLUDE_DIR}")
endif()
