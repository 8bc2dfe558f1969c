# First cache (cmake -C) of the tree that tools/gpu_bundle.sh packs: the libraries are those of the archive, host kernels our
# own, so that nothing depends on what a machine happens to have. What only the daemon and benchmarks need is not looked for,
# even where it is, so that a rehearsal on a machine that has it finds whoever asks.
set(MOED_ENGINE_ONLY ON CACHE BOOL "")
set(MOED_ONEDNN OFF CACHE BOOL "")
foreach(package spdlog nlohmann_json CLI11 GTest)
  set(${package}_DIR ${CMAKE_CURRENT_LIST_DIR} CACHE PATH "")
endforeach()
foreach(package benchmark Boost fmt gRPC oneDNN OpenSSL prometheus-cpp Protobuf)
  set(CMAKE_DISABLE_FIND_PACKAGE_${package} ON CACHE BOOL "")
endforeach()
