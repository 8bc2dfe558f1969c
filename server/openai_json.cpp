#include "server/openai_json.h"

#include <cmath>

#include "server/request_log.h"

namespace moed {

namespace {

constexpr size_t kUnknownMax = 16;
constexpr size_t kUnknownBytesMax = 64;
// Finding a key among n takes n steps: this bounds the sum of n^2 over a body's objects, a fraction of a second.
constexpr int64_t kMemberWorkMax = int64_t{1} << 26;

// Depth and size of objects, before any memory is taken for them. What is not JSON is left to the parser.
Status check_shape(std::string_view body, int64_t depth_max) {
  std::vector<int64_t> members;  // of each open object or array
  int64_t work = 0;
  bool in_string = false;
  for (size_t i = 0; i < body.size(); ++i) {
    const char c = body[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      members.push_back(0);
      if (static_cast<int64_t>(members.size()) > depth_max) {
        return invalid_argument("the request's JSON is nested deeper than " + std::to_string(depth_max) +
                                " levels (json_depth_max)");
      }
    } else if (c == ':' && !members.empty()) {
      work += 2 * members.back()++ + 1;
      if (work > kMemberWorkMax) return invalid_argument("the request's JSON objects have too many members");
    } else if ((c == '}' || c == ']') && !members.empty()) {
      members.pop_back();
    }
  }
  return Status();
}

}  // namespace

StatusOr<WireJson> parse_body(std::string_view body, int64_t depth_max) {
  MOED_RETURN_IF_ERROR(check_shape(body, depth_max));
  // The parser would take it for the end, and ignore what follows.
  if (const size_t zero = body.find('\0'); zero != std::string_view::npos) {
    return invalid_argument("the request's body is not valid JSON (at byte " + std::to_string(zero + 1) + ")");
  }
  try {
    WireJson json = WireJson::parse(body);
    if (!json.is_object()) return invalid_argument("the request's body must be a JSON object");
    return json;
  } catch (const nlohmann::json::parse_error& error) {
    return invalid_argument("the request's body is not valid JSON (at byte " + std::to_string(error.byte) + ")");
  } catch (const nlohmann::json::exception&) {
    return invalid_argument("the request's body holds a number that is out of range");
  }
}

std::string dump_json(const WireJson& json) { return json.dump(-1, ' ', false, WireJson::error_handler_t::replace); }

std::optional<int64_t> as_integer(const WireJson& value) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const auto number = value.get<double>();
    if (std::trunc(number) == number && std::fabs(number) < 9e15) return static_cast<int64_t>(number);
  }
  return std::nullopt;
}

const WireJson* BodyFields::find(const char* name) {
  known_.insert(name);
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

void BodyFields::fail(const char* name, const std::string& what) {
  if (status_.ok()) status_ = invalid_argument(path_ + name + " " + what, path_ + name);
}

void BodyFields::refuse(const char* name, const std::string& message) {
  if (!status_.ok()) return;
  status_ = Status(StatusCode::kUnimplemented, message.empty() ? path_ + name + " is not supported yet" : message,
                   path_ + name, "unsupported_parameter");
}

void BodyFields::read(const char* name, std::optional<double>& target) {
  const WireJson* const value = find(name);
  if (value == nullptr) return;
  if (!value->is_number()) return fail(name, "must be a number");
  target = value->get<double>();
}

void BodyFields::read(const char* name, std::optional<int64_t>& target) {
  const WireJson* const value = find(name);
  if (value == nullptr) return;
  target = as_integer(*value);
  if (!target) fail(name, "must be an integer");
}

void BodyFields::read(const char* name, std::optional<bool>& target) {
  const WireJson* const value = find(name);
  if (value == nullptr) return;
  if (!value->is_boolean()) return fail(name, "must be true or false");
  target = value->get<bool>();
}

void BodyFields::read(const char* name, std::string& target) {
  const WireJson* const value = find(name);
  if (value == nullptr) return;
  if (!value->is_string()) return fail(name, "must be a string");
  target = value->get<std::string>();
}

void BodyFields::read(const char* name, bool& target) {
  std::optional<bool> value;
  read(name, value);
  target = value.value_or(target);
}

void BodyFields::read(const char* name, int64_t& target) {
  std::optional<int64_t> value;
  read(name, value);
  target = value.value_or(target);
}

void BodyFields::read(const char* name, std::vector<int64_t>& target) {
  const WireJson* const value = find(name);
  if (value == nullptr) return;
  if (!value->is_array()) return fail(name, "must be an array of integers");
  for (const WireJson& item : *value) {
    const std::optional<int64_t> number = as_integer(item);
    if (!number) return fail(name, "must be an array of integers");
    target.push_back(*number);
  }
}

void BodyFields::read_object(const char* name, std::string& target) {
  const WireJson* const value = find(name);
  if (value == nullptr) return;
  if (!value->is_object()) return fail(name, "must be an object");
  target = dump_json(*value);
}

std::vector<std::string> BodyFields::unknown() const {
  std::vector<std::string> names;
  for (const auto& [name, value] : object_.items()) {
    if (names.size() == kUnknownMax) break;
    if (!known_.contains(name)) names.push_back(log_safe(name, kUnknownBytesMax));
  }
  return names;
}

}  // namespace moed
