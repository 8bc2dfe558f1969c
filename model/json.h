#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "base/status.h"

namespace moed {

using Json = nlohmann::json;

// Whole files of JSON from checkpoints are hostile: no duplicate keys, at most kJsonDepthMax deep, at most
// kJsonValuesMax values.
inline constexpr int kJsonDepthMax = 32;
inline constexpr int64_t kJsonValuesMax = 4'000'000;

// `where` begins each error: "config.json".
StatusOr<Json> parse_json(std::string_view text, const std::string& where);

// Reads a regular file of at most bytes_max. Errors: kNotFound, kInvalidArgument naming the path.
StatusOr<std::string> read_text_file(const std::string& path, int64_t bytes_max);

// A value as an error message shows it: its JSON, cut short.
std::string shown(const Json& value);

// Typed reads of an object's fields. The first wrong field is kept as status(); later reads go on with fallbacks, so
// that a parser reads all it wants and asks once. A null counts as absent. Does not own the object.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  // Null when absent or null.
  const Json* find(const char* key) const;
  // Absent altogether, not even null.
  bool contains(const char* key) const { return object_.contains(key); }
  int64_t integer(const char* key, int64_t fallback, int64_t min, int64_t max);
  int32_t int32(const char* key, int64_t fallback, int64_t min, int64_t max) {
    return static_cast<int32_t>(integer(key, fallback, min, max));
  }
  // min <= value <= max; the bounds are finite.
  double number(const char* key, double fallback, double min, double max);
  bool boolean(const char* key, bool fallback);
  std::string text(const char* key, std::string fallback);
  // Records "where: message" unless something was recorded before.
  void refuse(const std::string& message);
  void refuse(const char* key, const std::string& wanted);

  const Json& object() const { return object_; }
  const std::string& where() const { return where_; }
  const Status& status() const { return status_; }

 private:
  const Json& object_;
  std::string where_;
  Status status_;
};

}  // namespace moed
