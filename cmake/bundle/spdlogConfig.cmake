# Headers alone, with the fmt beside them, from the archive that tools/gpu_bundle.sh packs.
add_library(spdlog::spdlog INTERFACE IMPORTED)
target_include_directories(spdlog::spdlog INTERFACE ${CMAKE_CURRENT_LIST_DIR}/../../third_party/include)
target_compile_definitions(spdlog::spdlog INTERFACE SPDLOG_FMT_EXTERNAL FMT_HEADER_ONLY)
