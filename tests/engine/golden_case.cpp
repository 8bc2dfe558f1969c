#include "tests/engine/golden_case.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/bf16.h"
#include "base/check.h"

namespace moed {
namespace {

class ExpectedFile {
 public:
  explicit ExpectedFile(const std::string& path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    MOED_CHECK(file.good()) << path << " is missing";
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    uint64_t header_bytes = 0;
    MOED_CHECK(bytes_.size() >= sizeof(header_bytes)) << path;
    std::memcpy(&header_bytes, bytes_.data(), sizeof(header_bytes));
    MOED_CHECK(header_bytes <= bytes_.size() - sizeof(header_bytes)) << path;
    data_ = sizeof(header_bytes) + header_bytes;
    header_ = nlohmann::json::parse(bytes_.begin() + sizeof(header_bytes), bytes_.begin() + static_cast<int64_t>(data_),
                                    nullptr, false);
    MOED_CHECK(header_.is_object()) << path;
  }

  bool has(const std::string& name) const { return header_.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const { return entry(name).at("shape"); }
  template <class T>
  std::vector<T> read(const std::string& name) const {
    const nlohmann::json& at = entry(name);
    constexpr const char* kDtype = std::is_same_v<T, float> ? "F32" : std::is_same_v<T, Bf16> ? "BF16" : "I32";
    MOED_CHECK(at.at("dtype") == kDtype) << path_ << ": " << name;
    const size_t begin = data_ + at.at("data_offsets").at(0).get<size_t>();
    const size_t end = data_ + at.at("data_offsets").at(1).get<size_t>();
    MOED_CHECK(begin <= end && end <= bytes_.size()) << path_ << ": " << name;
    std::vector<T> values((end - begin) / sizeof(T));
    std::memcpy(values.data(), bytes_.data() + begin, end - begin);
    return values;
  }

 private:
  const nlohmann::json& entry(const std::string& name) const {
    MOED_CHECK(header_.contains(name)) << path_ << " has no " << name;
    return header_.at(name);
  }
  std::string path_;
  std::vector<char> bytes_;
  size_t data_ = 0;
  nlohmann::json header_;
};

template <class T>
std::vector<std::vector<T>> in_rows(const std::vector<T>& values, size_t cols) {
  std::vector<std::vector<T>> rows;
  for (size_t begin = 0; begin < values.size(); begin += cols) {
    rows.emplace_back(values.begin() + static_cast<int64_t>(begin),
                      values.begin() + static_cast<int64_t>(begin + cols));
  }
  return rows;
}

}  // namespace

std::string golden_dir(const std::string& name) { return std::string(MOED_SOURCE_DIR) + "/tests/golden/" + name; }

std::vector<GoldenPrompt> read_golden(const std::string& name) {
  const ExpectedFile file(golden_dir(name) + "/expected.safetensors");
  std::vector<GoldenPrompt> prompts(2);
  for (size_t p = 0; p < prompts.size(); ++p) {
    const std::string prefix = "prompt" + std::to_string(p) + ".";
    GoldenPrompt& prompt = prompts[p];
    prompt.tokens = file.read<int32_t>(prefix + "tokens");
    prompt.logits = in_rows(file.read<float>(prefix + "logits_fp32"), file.shape(prefix + "logits_fp32").at(1));
    prompt.logit_tolerance = file.read<float>(prefix + "logit_tolerance");
    prompt.compared = file.read<int32_t>(prefix + "compared");
    prompt.greedy_tokens = file.read<int32_t>(prefix + "greedy_tokens");
    prompt.greedy_compared = file.read<int32_t>(prefix + "greedy_compared").at(0);
    prompt.greedy_margin = file.read<float>(prefix + "greedy_margin");
    prompt.greedy_tolerance = file.read<float>(prefix + "greedy_tolerance");
    if (p == 1) {
      const std::vector<Bf16> rough = file.read<Bf16>(prefix + "logits_bf16");
      std::vector<float> wide(rough.size());
      std::transform(rough.begin(), rough.end(), wide.begin(), [](Bf16 value) { return static_cast<float>(value); });
      prompt.logits_bf16 = in_rows(wide, prompt.logits[0].size());
    }
    if (!file.has(prefix + "experts")) continue;
    prompt.router_margin = in_rows(file.read<float>(prefix + "router_margin"), prompt.tokens.size());
    prompt.router_error = in_rows(file.read<float>(prefix + "router_error"), prompt.tokens.size());
    const std::vector<int64_t> shape = file.shape(prefix + "experts");
    const auto rows = in_rows(file.read<int32_t>(prefix + "experts"), static_cast<size_t>(shape.at(2)));
    prompt.experts = in_rows(rows, static_cast<size_t>(shape.at(1)));
  }
  return prompts;
}

}  // namespace moed
