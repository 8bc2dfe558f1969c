#include "text/utf8.h"

#include <cstdint>

namespace moed {
namespace {

struct Scan {
  size_t size;    // bytes of the character, or of the ill-formed part
  bool valid;     // a whole character
  bool complete;  // false: the bytes end inside a character that is right so far
};

// The character that starts at bytes[0].
Scan scan(std::string_view bytes) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {1, true, true};
  size_t size = 0;
  if (lead >= 0xC2 && lead <= 0xDF) size = 2;
  if (lead >= 0xE0 && lead <= 0xEF) size = 3;
  if (lead >= 0xF0 && lead <= 0xF4) size = 4;
  if (size == 0) return {1, false, true};
  // The second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF.
  uint8_t low = 0x80, high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (size_t i = 1; i < size; ++i) {
    if (i == bytes.size()) return {i, false, false};
    if (byte(i) < low || byte(i) > high) return {i, false, true};
    low = 0x80;
    high = 0xBF;
  }
  return {size, true, true};
}

}  // namespace

size_t incomplete_utf8_suffix(std::string_view bytes) {
  for (size_t size = 1; size <= 3 && size <= bytes.size(); ++size) {
    const uint8_t byte = static_cast<uint8_t>(bytes[bytes.size() - size]);
    if (byte >= 0x80 && byte < 0xC0) continue;
    return scan(bytes.substr(bytes.size() - size)).complete ? 0 : size;
  }
  return 0;
}

bool is_valid_utf8(std::string_view bytes) {
  while (!bytes.empty()) {
    const Scan next = scan(bytes);
    if (!next.valid) return false;
    bytes.remove_prefix(next.size);
  }
  return true;
}

std::string replace_invalid_utf8(std::string_view bytes) {
  std::string result;
  result.reserve(bytes.size());
  while (!bytes.empty()) {
    const Scan next = scan(bytes);
    if (next.valid) {
      result.append(bytes.substr(0, next.size));
    } else {
      result.append("\xEF\xBF\xBD");
    }
    bytes.remove_prefix(next.size);
  }
  return result;
}

}  // namespace moed
