#include "server/request_log.h"

#include "base/log.h"

namespace moed {

namespace {

constexpr size_t kMethodBytesMax = 16;
constexpr size_t kPathBytesMax = 128;
constexpr size_t kFieldBytesMax = 64;

std::string or_dash(std::string_view text, size_t bytes_max) {
  return text.empty() ? std::string("-") : log_safe(text, bytes_max);
}

}  // namespace

void log_request(const RequestLine& line, bool quiet) {
  spdlog::log(quiet ? spdlog::level::debug : spdlog::level::info,
              "request id={} method={} path={} status={} total_ms={}{}", line.id, or_dash(line.method, kMethodBytesMax),
              or_dash(line.path, kPathBytesMax), line.status, line.us / 1000, line.notes);
}

std::string_view name_of(Outcome outcome) {
  switch (outcome) {
    case Outcome::kDone:
      return "done";
    case Outcome::kRefused:
      return "refused";
    case Outcome::kFailed:
      return "failed";
    case Outcome::kLeft:
      return "left";
    case Outcome::kCut:
      return "cut";
  }
  return "-";
}

std::string notes_of(const GenerationNotes& generation) {
  std::string notes = fmt::format(" outcome={} stream={} prompt_tokens={} cached_tokens={} completion_tokens={}",
                                  name_of(generation.outcome), generation.stream, generation.prompt_tokens,
                                  generation.cached_tokens, generation.completion_tokens);
  if (generation.first_token_us > 0) notes += fmt::format(" ttft_ms={}", generation.first_token_us / 1000);
  if (!generation.field.empty()) notes += " field=" + log_safe(generation.field, kFieldBytesMax);
  return notes;
}

std::string refusal_notes(std::string_view field) {
  return field.empty() ? " outcome=refused" : " outcome=refused field=" + log_safe(field, kFieldBytesMax);
}

std::string log_safe(std::string_view text, size_t bytes_max) {
  std::string out;
  for (const char c : text.substr(0, bytes_max)) {
    if (c >= 0x21 && c <= 0x7e) {
      out += c;
    } else {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  return out;
}

}  // namespace moed
