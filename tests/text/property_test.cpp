// Random templates, texts and byte sequences against what they must give, written down without the code under test.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "tests/text/tokenizer_fixture.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace moed {
namespace {

using Random = std::mt19937;

int below(Random& random, int bound) { return static_cast<int>(random() % static_cast<uint32_t>(bound)); }

std::string utf8_of(uint32_t code) {
  std::string out;
  if (code < 0x80) return {static_cast<char>(code)};
  const int tail = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  const uint32_t mark = tail == 1 ? 0xC0 : tail == 2 ? 0xE0 : 0xF0;
  out += static_cast<char>(mark | code >> (6 * tail));
  for (int i = tail - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
  return out;
}

// Any Unicode text, zero bytes and unassigned characters included.
std::string random_text(Random& random, int characters_max) {
  std::string text;
  for (int left = below(random, characters_max + 1); left > 0; --left) {
    const uint32_t bounds[] = {0x80, 0x80, 0x800, 0x10000, 0x110000};
    uint32_t code = random() % bounds[below(random, 5)];
    const bool surrogate = code >= 0xD800 && code < 0xE000;
    if (surrogate || code == 0x2581) code = 0xFFFD;  // SentencePiece spells a space as U+2581
    text += utf8_of(code);
  }
  return text;
}

// The one character that these bytes spell, if they do; its spelling must be its only one.
bool is_character(const std::string& bytes) {
  const auto first = static_cast<uint8_t>(bytes[0]);
  const size_t length = first < 0x80   ? 1
                        : first < 0xC0 ? 0
                        : first < 0xE0 ? 2
                        : first < 0xF0 ? 3
                        : first < 0xF8 ? 4
                                       : 0;
  if (length != bytes.size()) return false;
  uint32_t code = length == 1 ? first : first & (0xFFU >> (length + 1));
  for (size_t i = 1; i < length; ++i) code = code << 6 | (static_cast<uint8_t>(bytes[i]) & 0x3F);
  return code < 0x110000 && (code < 0xD800 || code >= 0xE000) && utf8_of(code) == bytes;
}

// Whether some bytes behind these would make a character of them.
bool begins_character(const std::string& bytes) {
  if (is_character(bytes)) return true;
  if (bytes.size() >= 4) return false;
  for (const int next : {0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF}) {
    if (begins_character(bytes + static_cast<char>(next))) return true;
  }
  return false;
}

struct Decoded {
  std::string text;
  size_t held = 0;  // bytes at the end that may become a character
};

// Unicode 15, 3.9: each maximal subpart of what is ill-formed becomes one U+FFFD.
Decoded decode_by_trying(const std::string& bytes) {
  Decoded out;
  for (size_t at = 0; at < bytes.size();) {
    size_t size = 1;
    while (!is_character(bytes.substr(at, size)) && at + size < bytes.size() &&
           begins_character(bytes.substr(at, size + 1))) {
      ++size;
    }
    const std::string part = bytes.substr(at, size);
    out.text += is_character(part) ? part : "\xEF\xBF\xBD";
    at += size;
    if (at == bytes.size() && !is_character(part) && begins_character(part)) out.held = size;
  }
  return out;
}

std::string random_bytes(Random& random, int bytes_max) {
  // Those at the edges of what may lead and follow.
  constexpr uint8_t kEdges[] = {0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF,
                                0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF};
  std::string bytes;
  for (int left = below(random, bytes_max + 1); left > 0; --left) {
    const int kind = below(random, 6);
    if (kind == 0) {
      bytes += random_text(random, 2);
    } else {
      bytes += static_cast<char>(kind == 1 ? random() : kEdges[below(random, std::size(kEdges))]);
    }
  }
  return bytes;
}

TEST(TextPropertyTest, AnyBytesDecodeAsUnicodeSays) {
  Random random(11);
  for (int round = 0; round < 20'000; ++round) {
    const std::string bytes = random_bytes(random, 12);
    const Decoded wanted = decode_by_trying(bytes);
    ASSERT_EQ(replace_invalid_utf8(bytes), wanted.text) << "round " << round << " " << testing::PrintToString(bytes);
    ASSERT_EQ(incomplete_utf8_suffix(bytes), wanted.held) << "round " << round << " " << testing::PrintToString(bytes);
  }
}

TEST(TextPropertyTest, AnyBytesAreStreamedAsTheyDecode) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  Random random(12);
  for (int round = 0; round < 2'000; ++round) {
    const std::string bytes = random_bytes(random, 20);
    Detokenizer detokenizer(*tokenizer, false, {});
    std::vector<int32_t> ids;
    std::string text;
    for (size_t i = 0; i < bytes.size(); ++i) {
      ids.push_back(static_cast<uint8_t>(bytes[i]));
      text += detokenizer.push(ids.back()).value();
      const std::string so_far = bytes.substr(0, i + 1);
      const Decoded wanted = decode_by_trying(so_far.substr(0, so_far.size() - decode_by_trying(so_far).held));
      ASSERT_EQ(text, wanted.text) << "round " << round << " byte " << i;  // no byte waits that need not
    }
    text += detokenizer.flush().value();
    ASSERT_EQ(text, decode_by_trying(bytes).text) << "round " << round;
    ASSERT_EQ(tokenizer->decode(ids, false).value(), text) << "round " << round;
  }
}

TEST(TextPropertyTest, AnyTextComesBackFromItsTokens) {
  const auto byte_level = load_tokenizer(byte_level_tokenizer());
  const auto fallback = load_tokenizer(byte_fallback_tokenizer());
  ASSERT_TRUE(byte_level != nullptr && fallback != nullptr);
  Random random(13);
  for (int round = 0; round < 3'000; ++round) {
    const std::string text = random_text(random, 30);
    for (const Tokenizer* tokenizer : {byte_level.get(), fallback.get()}) {
      const auto ids = tokenizer->encode(text, false);
      ASSERT_TRUE(ids.ok()) << ids.status().message();
      ASSERT_EQ(tokenizer->decode(*ids, false).value(), text) << "round " << round;
      for (const int32_t id : *ids) ASSERT_TRUE(tokenizer->has_token(id));
    }
    const std::string bytes = random_bytes(random, 8);
    ASSERT_EQ(byte_level->encode(bytes, false).ok(), decode_by_trying(bytes).text == bytes) << "round " << round;
  }
}

struct Message {
  std::string role, content;
};

// A random template as a tree that can be written down and, apart from that, acted out.
class Tree {
 public:
  Tree(Random& random, int depth) {
    kind_ = static_cast<Kind>(below(random, depth > 0 ? 9 : 6));
    number_ = below(random, 4);
    if (kind_ == kWords) {
      // No line begins with a space, and none is empty: what tags do to those is another matter.
      const char* const words[] = {"a", "|x", "é.", "中 文", "<|im|>", "%}", "a\n|", "\"", "😀", "b  c"};
      text_ = words[below(random, std::size(words))];
    } else if (kind_ == kQuoted) {
      const char* const quoted[] = {"", " ", "\n", "{{", "%}", "'", "<s>"};
      text_ = quoted[below(random, std::size(quoted))];
    } else if (kind_ >= kIf) {
      for (int left = 1 + below(random, 3); left > 0; --left) children_.emplace_back(random, depth - 1);
    }
  }

  std::string source() const {
    std::string inside;
    for (const Tree& child : children_) inside += child.source();
    const std::string number = std::to_string(number_);
    switch (kind_) {
      case kWords:
        return text_;
      case kQuoted:
        return "{{ \"" + (text_ == "\n" ? "\\n" : text_) + "\" }}";
      case kComment:
        return "{# {{ nothing }} #}";
      case kContent:
        return "{{ m.content }}";
      case kRole:
        return "{{ m['role'] | upper ~ " + number + " }}";
      case kSum:
        return "{% set n = " + number + " + 2 %}{{ n * n }}";
      case kIf:
        return "{% if m.role == 'user' and " + number + " > 1 %}" + inside + "{% else %}no{% endif %}";
      case kRange:
        return "{% for i in range(" + number + ") %}{{ i }}" + inside + "{% endfor %}";
      default:
        return "{% for m in messages %}{{ loop.index }}" + inside + "{% endfor %}";
    }
  }

  // `at`: which message m is.
  std::string acted(const std::vector<Message>& messages, size_t at) const {
    const auto inside = [&](size_t now) {
      std::string out;
      for (const Tree& child : children_) out += child.acted(messages, now);
      return out;
    };
    std::string out;
    switch (kind_) {
      case kWords:
      case kQuoted:
        return text_;
      case kComment:
        return "";
      case kContent:
        return messages[at].content;
      case kRole:
        for (const char c : messages[at].role) out += static_cast<char>(c - 'a' + 'A');
        return out + std::to_string(number_);
      case kSum:
        return std::to_string((number_ + 2) * (number_ + 2));
      case kIf:
        return messages[at].role == "user" && number_ > 1 ? inside(at) : "no";
      case kRange:
        for (int i = 0; i < number_; ++i) out += std::to_string(i) + inside(at);
        return out;
      default:
        for (size_t i = 0; i < messages.size(); ++i) out += std::to_string(i + 1) + inside(i);
        return out;
    }
  }

 private:
  enum Kind { kWords, kQuoted, kComment, kContent, kRole, kSum, kIf, kRange, kMessages };
  Kind kind_;
  int number_;
  std::string text_;
  std::vector<Tree> children_;
};

TEST(TextPropertyTest, RandomTemplatesDoWhatTheySay) {
  Random random(14);
  for (int round = 0; round < 1'000; ++round) {
    std::vector<Message> messages;
    nlohmann::json json = nlohmann::json::array();
    for (int left = 1 + below(random, 4); left > 0; --left) {
      messages.push_back({below(random, 2) == 0 ? "user" : "assistant", random_text(random, 10)});
      json.push_back({{"role", messages.back().role}, {"content", messages.back().content}});
    }
    std::string source = "^{% set m = messages[0] %}", wanted = "^";
    for (int left = 1 + below(random, 5); left > 0; --left) {
      const Tree tree(random, 3);
      source += tree.source();
      wanted += tree.acted(messages, 0);
    }
    source += "$", wanted += "$";
    const auto chat = ChatTemplate::from_source(source);
    ASSERT_TRUE(chat.ok()) << "round " << round << ": " << chat.status().message() << "\n" << source;
    const auto text = (*chat)->render(json.dump(), {});
    ASSERT_TRUE(text.ok()) << "round " << round << ": " << text.status().message() << "\n" << source;
    ASSERT_EQ(*text, wanted) << "round " << round << ": " << source << "\n" << json.dump();
  }
}

const char* const kNoise[] = {"{{",
                              "}}",
                              "{%",
                              "%}",
                              "{#",
                              "#}",
                              "{%-",
                              "-%}",
                              " for m in messages ",
                              " for ",
                              " in ",
                              " if ",
                              " elif ",
                              " else ",
                              " endif ",
                              " endfor ",
                              "messages",
                              "m.content",
                              "loop.index",
                              "|upper",
                              "|tojson",
                              "|join(',')",
                              "(",
                              ")",
                              "[",
                              "]",
                              "[::-1]",
                              "0",
                              "1",
                              "9999999999",
                              "'a'",
                              "+",
                              "~",
                              "*",
                              "**",
                              "//",
                              "%",
                              "<",
                              "==",
                              " not ",
                              " is defined ",
                              " macro f(x) ",
                              " endmacro ",
                              " f(f) ",
                              "namespace(a=1)",
                              " set x = ",
                              " set x.a = ",
                              "range(99999)",
                              "raise_exception('no')",
                              "strftime_now('%Y')",
                              "-",
                              "\n",
                              "é",
                              "x",
                              ".",
                              ",",
                              "{",
                              "}",
                              "None",
                              "True",
                              "\"",
                              "'",
                              "\\",
                              " generation ",
                              " endgeneration ",
                              " break ",
                              " call f(1) "};

TEST(TextPropertyTest, NoiseIsRenderedOrRefused) {
  ChatTemplateLimits limits;
  limits.fuel = 20'000;
  limits.output_bytes_max = 1 << 16;
  limits.memory_bytes_max = 64 << 20;
  limits.milliseconds_max = 2'000;
  Random random(15);
  ASSERT_FALSE(ChatTemplate::from_source("{%}", "{}", limits).ok());
  EXPECT_EQ(ChatTemplate::from_source("a{{%}b", "{}", limits).status().code(), StatusCode::kInvalidArgument);
  int num_rendered = 0, num_refused = 0;
  for (int round = 0; round < 6'000; ++round) {
    // Most begin as a template may; whole noise seldom gets beyond the parser.
    std::string source = round % 3 == 0 ? "" : round % 3 == 1 ? "{{ " : "{% for m in messages %}{{ m.content ";
    for (int left = 1 + below(random, 8); left > 0; --left) source += kNoise[below(random, std::size(kNoise))];
    if (round % 3 != 0) source += " }}";
    if (round % 3 == 2) source += "{% endfor %}";
    const auto chat = ChatTemplate::from_source(source, "{}", limits);
    const auto text =
        chat.ok() ? (*chat)->render(R"([{"role":"user","content":"hé"}])", {}) : StatusOr<std::string>(chat.status());
    if (text.ok()) {
      ASSERT_LE(text->size(), limits.output_bytes_max) << "round " << round << ": " << source;
      ASSERT_EQ(replace_invalid_utf8(*text), *text) << "round " << round << ": " << source;
      ++num_rendered;
    } else {
      ASSERT_EQ(text.status().code(), StatusCode::kInvalidArgument) << "round " << round << ": " << source;
      ASSERT_FALSE(text.status().message().empty()) << "round " << round << ": " << source;
      ++num_refused;
    }
  }
  EXPECT_GT(num_rendered, 100);
  EXPECT_GT(num_refused, 1'000);
}

}  // namespace
}  // namespace moed
