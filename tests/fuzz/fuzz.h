#pragma once

#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "base/status.h"
#include "tests/support/temporary_folder.h"

namespace moed {

// libFuzzer calls this with each input; a target ends the process when something is wrong.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

inline std::string_view input_text(const uint8_t* data, size_t size) {
  return size == 0 ? std::string_view() : std::string_view(reinterpret_cast<const char*>(data), size);
}

// What every refusal of hostile input is: the caller's fault, said in one sentence.
inline void check_refusal(const Status& status) {
  const bool callers_fault = status.code() == StatusCode::kInvalidArgument || status.code() == StatusCode::kNotFound ||
                             status.code() == StatusCode::kUnimplemented;
  MOED_CHECK(callers_fault) << "code " << static_cast<int>(status.code()) << ": " << status.message();
  MOED_CHECK(!status.message().empty()) << "a refusal without words";
  MOED_CHECK(status.message().size() < 4096) << "a refusal of " << status.message().size() << " bytes";
}

}  // namespace moed
