#pragma once

#include <string>
#include <string_view>

namespace moed {

// How many bytes at the end of `bytes` may begin a character that later bytes complete: 0 to 3.
size_t incomplete_utf8_suffix(std::string_view bytes);

bool is_valid_utf8(std::string_view bytes);

// `bytes` with every maximal ill-formed part replaced by U+FFFD, as Unicode recommends (section 3.9) and as both
// Python's and Rust's lossy decoding do.
std::string replace_invalid_utf8(std::string_view bytes);

}  // namespace moed
