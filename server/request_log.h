#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace moed {

// The one line that each request of either door leaves in the log when it ends:
//   request id=ID method=POST path=/v1/completions status=200 total_ms=12 NOTES
// `method` and `path` come from the client and are escaped and cut, empty ones become "-". `notes`: " name=value ...",
// safe as they are. No text of prompts or answers, no query, no key.
struct RequestLine {
  std::string_view id, method, path;
  std::string_view status;  // "200"; of gRPC "RESOURCE_EXHAUSTED"
  int64_t us = 0;
  std::string_view notes;
};

// `quiet`: at level debug, for what probes ask every few seconds; else at info.
void log_request(const RequestLine& line, bool quiet);

// How a request ended. Left: the client did, before its answer was out. Cut: the server gave it up, at its own end or
// for a client that takes nothing.
enum class Outcome : uint8_t { kDone, kRefused, kFailed, kLeft, kCut };
std::string_view name_of(Outcome outcome);  // "done"

// What of a request that generates is known at its end.
struct GenerationNotes {
  Outcome outcome = Outcome::kLeft;
  std::string_view field;  // that was refused, or empty
  bool stream = false;
  int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  int64_t first_token_us = 0;  // since the request came; 0: there was none
};
std::string notes_of(const GenerationNotes& generation);
// The same for one that was refused before anything was done for it; `field` may be empty.
std::string refusal_notes(std::string_view field);

// `text` for a log line: printable ASCII without spaces, the rest as \x1b, cut to so many bytes of it.
std::string log_safe(std::string_view text, size_t bytes_max);

}  // namespace moed
