#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace moed {

// Keeps the order of keys: templates print what clients sent.
using WireJson = nlohmann::ordered_json;

// Parses a request's body: an object, valid UTF-8, nested at most `depth_max` deep. Messages give positions, never
// text.
StatusOr<WireJson> parse_body(std::string_view body, int64_t depth_max);

// Text that never throws: bytes that are not UTF-8 become U+FFFD.
std::string dump_json(const WireJson& json);

// Reads the fields of a JSON object by name and type. null counts as absent. Keeps the first error, and which fields
// were asked for.
class BodyFields {
 public:
  // `path` goes before the names in errors: "stream_options." or empty.
  explicit BodyFields(const WireJson& object, std::string path = {}) : object_(object), path_(std::move(path)) {}

  // Null when absent.
  const WireJson* find(const char* name);
  void read(const char* name, std::optional<double>& target);
  void read(const char* name, std::optional<int64_t>& target);
  void read(const char* name, std::optional<bool>& target);
  void read(const char* name, std::string& target);
  void read(const char* name, bool& target);
  void read(const char* name, int64_t& target);
  void read(const char* name, std::vector<int64_t>& target);
  // An object as JSON text.
  void read_object(const char* name, std::string& target);

  void fail(const char* name, const std::string& what);  // "<path><name> <what>"
  void refuse(const char* name, const std::string& message = {});
  // Known, and without effect: type not checked.
  void ignore(const char* name) { (void)find(name); }

  // Fields somebody asked for.
  const std::set<std::string, std::less<>>& known() const { return known_; }

  const Status& status() const { return status_; }
  // Fields nobody asked for: escaped, at most 16.
  std::vector<std::string> unknown() const;

 private:
  const WireJson& object_;
  std::string path_;
  std::set<std::string, std::less<>> known_;
  Status status_;
};

// A JSON number that is whole and fits 64 bits; 5.0 counts as 5.
std::optional<int64_t> as_integer(const WireJson& value);

}  // namespace moed
