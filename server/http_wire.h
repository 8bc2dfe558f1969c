#pragma once

#include <ctime>
#include <string>
#include <string_view>

#include "server/http_server.h"

namespace moed {

// How a reply is put on the wire.
struct Framing {
  bool streaming = false;  // the body follows
  bool chunked = false;
  bool keep_alive = true;
  bool http_1_0 = false;
  bool head_only = false;  // the answer to HEAD
};

// Pure helpers of the HTTP server.

// The head, and (unless streaming or head_only) the body. Header values lose line breaks.
std::string reply_bytes(const HttpReply& reply, const Framing& framing, std::time_t now);
// One chunk of a chunked body. `piece` is not empty.
std::string chunk_of(std::string_view piece);
// Fills path and query. Takes the absolute form ("http://host/path") as well.
void split_target(const std::string& target, HttpRequest& request);
std::string lower_case(std::string_view text);
// Whether `list` is names of headers with commas between: "content-type, x-a".
bool is_header_names(std::string_view list);
// "%2F" -> "/"; what is not a percent-code stays.
std::string percent_decoded(std::string_view text);

}  // namespace moed
