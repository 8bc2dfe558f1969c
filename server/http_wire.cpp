#include "server/http_wire.h"

#include <algorithm>
#include <array>

namespace moed {

namespace {

const char* reason(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 413:
      return "Payload Too Large";
    case 415:
      return "Unsupported Media Type";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    default:
      return "Unknown";
  }
}

std::string http_date(std::time_t now) {
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 40> text{};
  const size_t length = std::strftime(text.data(), text.size(), "%a, %d %b %Y %H:%M:%S GMT", &parts);
  return std::string(text.data(), length);
}

void add_header(std::string& out, std::string_view name, std::string_view value) {
  out.append(name).append(": ");
  std::copy_if(value.begin(), value.end(), std::back_inserter(out),
               [](char c) { return c != '\r' && c != '\n' && c != '\0'; });
  out += "\r\n";
}

int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::string reply_bytes(const HttpReply& reply, const Framing& framing, std::time_t now) {
  std::string out = "HTTP/1.1 " + std::to_string(reply.status) + " " + reason(reply.status) + "\r\n";
  add_header(out, "Date", http_date(now));
  add_header(out, "Server", "moed");
  const bool has_body = reply.status != 204;
  if (has_body) add_header(out, "Content-Type", reply.content_type);
  for (const auto& [name, value] : reply.headers) add_header(out, name, value);
  if (framing.chunked) {
    add_header(out, "Transfer-Encoding", "chunked");
  } else if (!framing.streaming && has_body) {
    add_header(out, "Content-Length", std::to_string(reply.body.size()));
  }
  if (!framing.keep_alive) {
    add_header(out, "Connection", "close");
  } else if (framing.http_1_0) {
    add_header(out, "Connection", "keep-alive");
  }
  out += "\r\n";
  if (!framing.streaming && !framing.head_only && has_body) out += reply.body;
  return out;
}

std::string chunk_of(std::string_view piece) {
  std::array<char, 20> size{};
  const int length = std::snprintf(size.data(), size.size(), "%zx\r\n", piece.size());
  std::string out(size.data(), static_cast<size_t>(length));
  out.append(piece).append("\r\n");
  return out;
}

void split_target(const std::string& target, HttpRequest& request) {
  std::string_view rest = target;
  const std::string lower = lower_case(rest.substr(0, 8));
  if (lower.starts_with("http://") || lower.starts_with("https://")) {
    const size_t slash = rest.find('/', lower.starts_with("https://") ? 8 : 7);
    rest = slash == std::string_view::npos ? std::string_view("/") : rest.substr(slash);
  }
  const size_t mark = rest.find('?');
  request.path = std::string(rest.substr(0, mark));
  request.query = mark == std::string_view::npos ? std::string() : std::string(rest.substr(mark + 1));
}

std::string lower_case(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  return out;
}

bool is_header_names(std::string_view list) {
  constexpr std::string_view kMarks = "!#$%&'*+-.^_`|~";
  bool in_name = false, ended = false;  // of the name that is being read
  for (const char c : list) {
    const char lower = static_cast<char>(c | 0x20);
    if ((c >= '0' && c <= '9') || (lower >= 'a' && lower <= 'z') || kMarks.find(c) != std::string_view::npos) {
      if (ended) return false;
      in_name = true;
    } else if (c == ',') {
      if (!in_name) return false;
      in_name = ended = false;
    } else if (c == ' ' || c == '\t') {
      ended = in_name;
    } else {
      return false;
    }
  }
  return in_name;
}

std::string percent_decoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size()) {
      const int high = hex_value(text[i + 1]);
      const int low = hex_value(text[i + 2]);
      if (high >= 0 && low >= 0) {
        out += static_cast<char>(high * 16 + low);
        i += 2;
        continue;
      }
    }
    out += text[i];
  }
  return out;
}

std::string_view HttpRequest::header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return {};
}

}  // namespace moed
