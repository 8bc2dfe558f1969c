#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "tests/support/temporary_folder.h"
#include "text/tokenizer.h"

namespace moed {

// The character by which byte-level BPE spells `byte`, and a whole string so spelt.
std::string byte_level_char(uint8_t byte);
std::string byte_level(std::string_view bytes);

// A byte-level BPE: ids 0..255 are the bytes 0..255, then a few merges, then <|im_start|>, <|im_end|> (special) and
// <think> (added, not special).
nlohmann::json byte_level_tokenizer();
// A SentencePiece-like BPE with byte fallback: <unk>, <s>, </s>, then <0x00>..<0xFF> (ids 3..258), then pieces. Its
// post-processor puts <s> first.
nlohmann::json byte_fallback_tokenizer();

std::unique_ptr<Tokenizer> load_tokenizer(const nlohmann::json& tokenizer,
                                          const nlohmann::json& config = nlohmann::json::object());

}  // namespace moed
