#pragma once

#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "base/check.h"
#include "base/status.h"

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

// A folder of this process, gone when it ends as it should.
class FuzzFolder {
 public:
  FuzzFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "moed-fuzz-XXXXXX").string();
    MOED_CHECK(mkdtemp(pattern.data()) != nullptr) << "cannot make " << pattern;
    path_ = pattern;
  }
  ~FuzzFolder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  FuzzFolder(const FuzzFolder&) = delete;
  FuzzFolder& operator=(const FuzzFolder&) = delete;

  std::string path(const std::string& name = "") const { return name.empty() ? path_ : path_ + "/" + name; }
  void write(const std::string& name, std::string_view bytes) const {
    std::ofstream file(path(name), std::ios::binary | std::ios::trunc);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    MOED_CHECK(file.good()) << "cannot write " << path(name);
  }
  void remove(const std::string& name) const { std::filesystem::remove(path(name)); }

 private:
  std::string path_;
};

}  // namespace moed
