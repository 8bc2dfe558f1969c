#include "model/json.h"

#include <sys/stat.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace moed {
namespace {

// Builds a document while it counts: nlohmann's own builder knows no limits and keeps the last of two equal keys.
class StrictBuilder : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return fail("binary values are not JSON"); }
  bool start_object(size_t) override { return open(Json::object()); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (open_.back()->contains(name)) return fail("the key \"" + name.substr(0, 100) + "\" stands twice");
    key_ = std::move(name);
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return fail("not valid JSON at byte " + std::to_string(position));
  }

  Json take() { return std::move(root_); }
  const std::string& error() const { return error_; }

 private:
  Json* place(Json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[std::move(key_)] = std::move(value));
  }
  bool add(Json value) {
    if (++values_ > kJsonValuesMax) return fail("more than " + std::to_string(kJsonValuesMax) + " values");
    place(std::move(value));
    return true;
  }
  bool open(Json container) {
    if (static_cast<int>(open_.size()) >= kJsonDepthMax) {
      return fail("nested deeper than " + std::to_string(kJsonDepthMax) + " levels");
    }
    if (++values_ > kJsonValuesMax) return fail("more than " + std::to_string(kJsonValuesMax) + " values");
    open_.push_back(place(std::move(container)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }
  bool fail(std::string error) {
    if (error_.empty()) error_ = std::move(error);
    return false;
  }

  Json root_;
  // An open container never moves: its parent grows only after it is closed.
  std::vector<Json*> open_;
  std::string key_;
  std::string error_;
  int64_t values_ = 0;
};

}  // namespace

StatusOr<Json> parse_json(std::string_view text, const std::string& where) {
  StrictBuilder builder;
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) return invalid_argument(where + ": " + builder.error());
  return builder.take();
}

StatusOr<std::string> read_text_file(const std::string& path, int64_t bytes_max) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) return Status(StatusCode::kNotFound, path + ": " + std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return invalid_argument(path + ": not a regular file");
  if (info.st_size > bytes_max) {
    return invalid_argument(fmt::format("{}: {} bytes, at most {} are read", path, info.st_size, bytes_max));
  }
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<size_t>(info.st_size), '\0');
  if (!file.read(text.data(), info.st_size)) return invalid_argument(path + ": cannot be read");
  return text;
}

std::string shown(const Json& value) {
  constexpr size_t kShownMax = 60;
  if (value.is_object() || value.is_array()) {
    if (value.size() > 8) return value.is_object() ? "an object" : fmt::format("a list of {}", value.size());
  }
  const std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() <= kShownMax ? text : text.substr(0, kShownMax) + "...";
}

const Json* Fields::find(const char* key) const {
  const auto found = object_.find(key);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

void Fields::refuse(const std::string& message) {
  if (status_.ok()) status_ = invalid_argument(where_ + ": " + message);
}

void Fields::refuse(const char* key, const std::string& wanted) {
  const Json* value = find(key);
  refuse(fmt::format("{} is {}, want {}", key, value == nullptr ? "absent" : shown(*value), wanted));
}

int64_t Fields::integer(const char* key, int64_t fallback, int64_t min, int64_t max) {
  const Json* value = find(key);
  if (value == nullptr) return fallback;
  const std::string wanted = fmt::format("an integer from {} to {}", min, max);
  // Some tools write 4096.0. Whatever lies outside [min, max] needs no exact value; the bounds are exact in a double.
  if (value->is_number()) {
    const double number = value->get<double>();
    if (number >= static_cast<double>(min) && number <= static_cast<double>(max) && number == std::floor(number)) {
      return value->is_number_float() ? static_cast<int64_t>(number) : value->get<int64_t>();
    }
  }
  refuse(key, wanted);
  return fallback;
}

double Fields::number(const char* key, double fallback, double min, double max) {
  const Json* value = find(key);
  if (value == nullptr) return fallback;
  if (value->is_number()) {
    if (const double number = value->get<double>(); number >= min && number <= max) return number;
  }
  refuse(key, fmt::format("a number from {} to {}", min, max));
  return fallback;
}

bool Fields::boolean(const char* key, bool fallback) {
  const Json* value = find(key);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  refuse(key, "true or false");
  return fallback;
}

std::string Fields::text(const char* key, std::string fallback) {
  const Json* value = find(key);
  if (value == nullptr) return fallback;
  if (value->is_string()) return value->get<std::string>();
  refuse(key, "a string");
  return fallback;
}

}  // namespace moed
