#include "tests/text/tokenizer_fixture.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>

namespace moed {
namespace {

using nlohmann::json;

json added_token(int id, const std::string& content, bool special) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

// Every merge's result joins the vocabulary.
json bpe_model(json vocabulary, const std::vector<std::pair<std::string, std::string>>& merges, bool byte_fallback) {
  json merge_list = json::array();
  for (const auto& [left, right] : merges) {
    merge_list.push_back(json::array({left, right}));
    if (!vocabulary.contains(left + right)) vocabulary[left + right] = vocabulary.size();
  }
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", byte_fallback ? json("<unk>") : json(nullptr)},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", byte_fallback},
          {"byte_fallback", byte_fallback},
          {"ignore_merges", false},
          {"vocab", vocabulary},
          {"merges", merge_list}};
}

}  // namespace

std::string byte_level_char(uint8_t byte) {
  const auto printable = [](int b) { return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xFF && b != 0xAD); };
  int code = byte;
  if (!printable(byte)) {
    code = 0x100;
    for (int b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};
}

std::string byte_level(std::string_view bytes) {
  std::string result;
  for (const char c : bytes) result += byte_level_char(static_cast<uint8_t>(c));
  return result;
}

json byte_level_tokenizer() {
  json vocabulary = json::object();
  for (int byte = 0; byte < 256; ++byte) vocabulary[byte_level_char(static_cast<uint8_t>(byte))] = byte;
  const auto merge = [](std::string_view left, std::string_view right) {
    return std::pair(byte_level(left), byte_level(right));
  };
  // The emoji's merge leaves off its last byte, so that a token ends inside a character.
  json model = bpe_model(vocabulary,
                         {merge("h", "e"), merge(" ", "t"), merge(" t", "he"), merge("l", "l"), merge("he", "ll"),
                          merge("\xF0", "\x9F"), merge("\xF0\x9F", "\x98"), merge("\xE4", "\xB8"), merge("o", " ")},
                         false);
  const int next = static_cast<int>(model["vocab"].size());
  const json byte_level_step = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  return {
      {"version", "1.0"},
      {"truncation", {{"direction", "Right"}, {"max_length", 4}, {"strategy", "LongestFirst"}, {"stride", 0}}},
      {"padding", nullptr},
      {"added_tokens", json::array({added_token(next, "<|im_start|>", true), added_token(next + 1, "<|im_end|>", true),
                                    added_token(next + 2, "<think>", false)})},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level_step},
      {"post_processor", nullptr},
      {"decoder", byte_level_step},
      {"model", model}};
}

json byte_fallback_tokenizer() {
  json vocabulary = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    snprintf(name, sizeof name, "<0x%02X>", byte);
    vocabulary[name] = vocabulary.size();
  }
  const std::string space = "\xE2\x96\x81";
  for (const char* piece : {"a", "b", "c", "d", "e", "h", "l", "o", "r", "t", "w", ".", "ä"}) {
    vocabulary[piece] = vocabulary.size();
  }
  vocabulary[space] = vocabulary.size();
  json model = bpe_model(
      vocabulary, {{"h", "e"}, {"l", "l"}, {"he", "ll"}, {"hell", "o"}, {space, "hello"}, {space, "w"}, {space, space}},
      true);
  const json replace_back = {{"type", "Replace"}, {"pattern", {{"String", space}}}, {"content", " "}};
  const json normalizer = {
      {"type", "Sequence"},
      {"normalizers", json::array({{{"type", "Prepend"}, {"prepend", space}},
                                   {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", space}}})}};
  const json decoder = {{"type", "Sequence"},
                        {"decoders", json::array({replace_back,
                                                  {{"type", "ByteFallback"}},
                                                  {{"type", "Fuse"}},
                                                  {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}})}};
  const json bos = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}};
  const json post_processor = {
      {"type", "TemplateProcessing"},
      {"single", json::array({bos, {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}})},
      {"pair",
       json::array(
           {bos, {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "B"}, {"type_id", 1}}}}})},
      {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", json::array({1})}, {"tokens", json::array({"<s>"})}}}}}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens",
           json::array({added_token(0, "<unk>", true), added_token(1, "<s>", true), added_token(2, "</s>", true)})},
          {"normalizer", normalizer},
          {"pre_tokenizer", nullptr},
          {"post_processor", post_processor},
          {"decoder", decoder},
          {"model", model}};
}

std::unique_ptr<Tokenizer> load_tokenizer(const json& tokenizer, const json& config) {
  TemporaryFolder folder;
  folder.write("tokenizer.json", tokenizer.dump());
  folder.write("tokenizer_config.json", config.dump());
  auto loaded = Tokenizer::load(folder.path());
  EXPECT_TRUE(loaded.ok()) << loaded.status().message();
  return loaded.ok() ? std::move(loaded).value() : nullptr;
}

}  // namespace moed
