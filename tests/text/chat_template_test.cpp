#include "text/chat_template.h"

#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "tests/text/tokenizer_fixture.h"

namespace moed {
namespace {

using nlohmann::ordered_json;

const std::string kData = std::string(MOED_SOURCE_DIR) + "/tests/text/data/";
const char kUser[] = R"([{"role":"user","content":"hi"}])";

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::unique_ptr<ChatTemplate> from_source(const std::string& source, ChatTemplateLimits limits = {}) {
  auto chat = ChatTemplate::from_source(source, R"({"bos_token":"<s>","eos_token":"</s>"})", limits);
  EXPECT_TRUE(chat.ok()) << chat.status().message();
  return chat.ok() ? std::move(chat).value() : nullptr;
}

std::unique_ptr<ChatTemplate> from_data(const std::string& name) { return from_source(read(kData + name)); }

std::string render(const ChatTemplate& chat, const std::string& messages, const ChatTemplateOptions& options = {}) {
  auto text = chat.render(messages, options);
  EXPECT_TRUE(text.ok()) << text.status().message();
  return text.ok() ? *text : "";
}

void expect_refused(const StatusOr<std::string>& text, const std::string& part) {
  ASSERT_FALSE(text.ok()) << text->substr(0, 200);
  EXPECT_EQ(text.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(text.status().message().find(part), std::string::npos) << text.status().message();
}

TEST(ChatTemplateTest, RendersAsJinja2Does) {
  const ordered_json golden = ordered_json::parse(read(kData + "chat_goldens.json"));
  int num_texts = 0, num_raised = 0;
  for (const auto& item : golden["cases"]) {
    SCOPED_TRACE(item["template"].get<std::string>() + ", " + item["conversation"].get<std::string>());
    auto chat = ChatTemplate::from_source(read(kData + item["template"].get<std::string>()), golden["specials"].dump());
    ASSERT_TRUE(chat.ok()) << chat.status().message();
    ChatTemplateOptions options;
    options.add_generation_prompt = item["add_generation_prompt"];
    options.kwargs_json = item["kwargs"].dump();
    if (item.contains("tools")) options.tools_json = item["tools"].dump();
    const auto text = (*chat)->render(item["messages"].dump(), options);
    if (item.contains("text")) {
      ASSERT_TRUE(text.ok()) << text.status().message();
      EXPECT_EQ(*text, item["text"].get<std::string>());
      ++num_texts;
    } else if (item.contains("raises")) {
      ASSERT_FALSE(text.ok());
      EXPECT_EQ(text.status().code(), StatusCode::kInvalidArgument);
      EXPECT_EQ(text.status().message(), item["raises"].get<std::string>());
      ++num_raised;
    }
  }
  EXPECT_GE(num_texts, 28);
  EXPECT_GE(num_raised, 4);
}

TEST(ChatTemplateTest, ContinuesTheFinalMessage) {
  ChatTemplateOptions options;
  options.add_generation_prompt = false;
  options.continue_final_message = true;
  const auto chat = from_data("chatml.jinja");
  ASSERT_NE(chat, nullptr);
  const char open[] = R"([{"role":"user","content":"q"},{"role":"assistant","content":"The answer is "}])";
  EXPECT_EQ(render(*chat, open, options), "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nThe answer is ");
  const char parts[] = R"([{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}])";
  EXPECT_EQ(render(*chat, parts, options), "<|im_start|>user\nab");
  // A template that trims the message.
  const auto trimming = from_data("header_ids.jinja");
  ASSERT_NE(trimming, nullptr);
  const std::string text = render(*trimming, open, options);
  EXPECT_TRUE(text.ends_with("The answer is")) << text;
  expect_refused(chat->render(R"([{"role":"assistant","content":null}])", options), "continue_final_message");
  expect_refused(chat->render("[]", options), "continue_final_message");
  options.add_generation_prompt = true;
  expect_refused(chat->render(open, options), "add_generation_prompt");
  const auto deaf = from_source("nothing");
  options.add_generation_prompt = false;
  expect_refused(deaf->render(open, options), "does not show");
}

TEST(ChatTemplateTest, NowInStrftime) {
  const auto chat = from_source("{{ strftime_now('%Y') }}|{{ strftime_now('') }}");
  ASSERT_NE(chat, nullptr);
  const std::string text = render(*chat, kUser);
  const auto days = std::chrono::floor<std::chrono::days>(std::chrono::system_clock::now());
  const int year = static_cast<int>(std::chrono::year_month_day(days).year());
  ASSERT_TRUE(text.ends_with("|"));
  EXPECT_LE(std::abs(std::stoi(text) - year), 1);  // local time and a year's turn
}

TEST(ChatTemplateTest, DetectsAbilities) {
  EXPECT_FALSE(from_data("chatml.jinja")->knows_developer_role());
  EXPECT_TRUE(from_data("header_ids.jinja")->knows_developer_role());
  EXPECT_FALSE(from_data("inst.jinja")->knows_developer_role());
  EXPECT_TRUE(from_data("chatml.jinja")->takes_content_lists());
  EXPECT_FALSE(from_data("header_ids.jinja")->takes_content_lists());
  EXPECT_FALSE(from_data("inst.jinja")->takes_content_lists());
  EXPECT_FALSE(from_source("{{ messages[0].content }}")->takes_content_lists());
}

TEST(ChatTemplateTest, BadRequestsAreNamed) {
  const auto chat = from_data("chatml.jinja");
  ASSERT_NE(chat, nullptr);
  expect_refused(chat->render("{}", {}), "messages must be an array");
  expect_refused(chat->render("[", {}), "messages");
  expect_refused(chat->render("\"\xFF\"", {}), "UTF-8");
  expect_refused(chat->render(std::string(5000, '['), {}), "nested too deeply");
  expect_refused(chat->render(kUser, {.tools_json = "{}"}), "tools must be an array");
  expect_refused(chat->render(kUser, {.kwargs_json = "[]"}), "chat_template_kwargs");
  expect_refused(chat->render(kUser, {.kwargs_json = R"({"messages":[]})"}), "\"messages\"");
  const auto failing = from_source("{{ messages[0].content.nope.nope }}\n");
  expect_refused(failing->render(R"([{"role":"user","content":"secret"}])", {}), "the chat template failed");
  EXPECT_EQ(failing->render(R"([{"role":"user","content":"secret"}])", {}).status().message().find("secret"),
            std::string::npos);
}

TEST(ChatTemplateTest, RaisedMessagesAreShortenedAndOneLine) {
  const auto chat = from_source("{{ raise_exception('a\nb' ~ 'x' * 5000) }}");
  ASSERT_NE(chat, nullptr);
  const Status status = chat->render(kUser, {}).status();
  EXPECT_TRUE(status.message().starts_with("a bxx")) << status.message();
  EXPECT_LT(status.message().size(), 600u);
}

TEST(HostileTemplateTest, InstructionsAreBounded) {
  expect_refused(from_source("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}")
                     ->render(kUser, {}),
                 "template_fuel");
  const auto small = from_source("{% for i in range(100) %}{{ i }}{% endfor %}", {.fuel = 50});
  expect_refused(small->render(kUser, {}), "limit of 50 instructions");
}

TEST(HostileTemplateTest, OutputIsBounded) {
  const auto chat =
      from_source("{% for i in range(10000) %}{{ 'x' * 1000 }}{% endfor %}", {.output_bytes_max = 100'000});
  expect_refused(chat->render(kUser, {}), "limit of 100000 bytes (template_output_bytes)");
  const auto fits = from_source("{{ 'x' * 1000 }}", {.output_bytes_max = 1000});
  EXPECT_EQ(render(*fits, kUser).size(), 1000u);
}

TEST(HostileTemplateTest, RecursionIsBounded) {
  const auto chat = from_source("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}");
  expect_refused(chat->render(kUser, {}), "the chat template failed");
  EXPECT_FALSE(ChatTemplate::from_source("{{ " + std::string(100'000, '(') + " }}").ok());
  // The parser recurses on these without a limit of its own: the large stack must hold the longest template there may
  // be.
  for (const char* sign : {"-", "not "}) {
    std::string source = "{{ ";
    while (source.size() < 1'000'000) source += sign;
    (void)ChatTemplate::from_source(source + "1 }}");
  }
  std::string nested;
  for (int i = 0; i < 50'000; ++i) nested += "{% if 1 %}";
  EXPECT_FALSE(ChatTemplate::from_source(nested).ok());
}

// Each would take the process down if values were dropped, printed or compared on a common stack.
TEST(HostileTemplateTest, DeepValuesDoNotOverflowTheStack) {
  const std::string build =
      "{% set ns = namespace(x=[]) %}{% for i in range(3) %}{% for j in range(100000) %}"
      "{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
  const ChatTemplateLimits limits{.fuel = 4'000'000};
  EXPECT_EQ(render(*from_source(build + "done", limits), kUser), "done");
  expect_refused(from_source(build + "{{ ns.x }}", limits)->render(kUser, {}), "nested more than");
  expect_refused(from_source(build + "{{ ns.x | tojson }}", limits)->render(kUser, {}), "nested more than");
  EXPECT_EQ(render(*from_source(build + "{{ ns.x == [ns.x] }}", limits), kUser), "False");
}

TEST(HostileTemplateTest, MemoryIsBounded) {
  const auto chat = from_source(
      "{% if messages[0].role == 'bomb' %}{% set ns = namespace(s='xxxxxxxx') %}"
      "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{% endif %}ok",
      {.memory_bytes_max = 64 << 20});
  ASSERT_NE(chat, nullptr);
  const char bomb[] = R"([{"role":"bomb","content":""}])";
  for (int i = 0; i < 4; ++i) expect_refused(chat->render(bomb, {}), "bytes of memory");
  // What a stopped rendering holds is lost, so it may not happen without end.
  expect_refused(chat->render(bomb, {}), "no longer run");
  EXPECT_EQ(render(*from_source("ok"), kUser), "ok");
}

// Renderings that are stopped are counted, and after a few none is run any more: no request may bring that about.
TEST(HostileTemplateTest, LargeRequestsDoNotSpendTheTemplate) {
  const auto chat = from_source(
      "{% for m in messages %}{{ m.content }}{% for w in (m.content | string).split('\n') %}{% endfor %}{% endfor %}",
      {.fuel = 100'000'000, .memory_bytes_max = 64 << 20});
  ASSERT_NE(chat, nullptr);
  std::string objects = R"({"x":[{})";
  for (int i = 0; i < 2'000'000; ++i) objects += ",{}";
  ChatTemplateOptions large;
  large.kwargs_json = objects + "]}";
  ordered_json lines;
  lines.push_back({{"role", "user"}, {"content", std::string(4 << 20, '\n')}});
  const std::string many = "[" + objects + "]}]";
  const std::string long_text = lines.dump();
  for (int i = 0; i < 6; ++i) {
    expect_refused(chat->render(kUser, large), "messages and chat_template_kwargs are too large");
    expect_refused(chat->render(many, {}), "messages and chat_template_kwargs are too large");
    expect_refused(chat->render(long_text, {}), "messages and chat_template_kwargs are too large");
  }
  EXPECT_EQ(render(*chat, kUser), "hi");
  // What is just let in does not run out of memory either.
  lines[0]["content"] = std::string((16 << 20) / 24 - 200, '\n');
  const auto text = chat->render(lines.dump(), {});
  EXPECT_TRUE(text.ok()) << text.status().message();
}

TEST(HostileTemplateTest, CopiesAreBounded) {
  const auto chat = from_source(
      "{% set ns = namespace(s='x' * 10000000) %}{% for i in range(100000) %}"
      "{% set ns.t = ns.s ~ 'y' %}{% endfor %}");
  const auto start = std::chrono::steady_clock::now();
  expect_refused(chat->render(kUser, {}), "past the limit");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

// Work that neither counts as instructions nor allocates: the caller gets its answer, the thread ends by itself.
TEST(HostileTemplateTest, TimeIsBounded) {
  const auto chat = from_source(
      "{% set s = 'x' * 10000000 %}{% for i in range(messages | length) %}"
      "{% if s | length == 1 %}{% endif %}{% endfor %}ok",
      {.fuel = 100'000'000, .milliseconds_max = 1000});
  ASSERT_NE(chat, nullptr);
  std::string messages = "[0";
  for (int i = 0; i < 10'000; ++i) messages += ",0";
  expect_refused(chat->render(messages + "]", {}), "limit of 1 s");
}

TEST(ChatTemplateTest, ManyThreadsAtOnce) {
  const auto chat = from_data("chatml.jinja");
  ASSERT_NE(chat, nullptr);
  const std::string expected = render(*chat, kUser);
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 100; ++i) {
        const auto text = chat->render(kUser, {});
        if (!text.ok() || *text != expected) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ChatTemplateFilesTest, WhereTemplatesComeFrom) {
  TemporaryFolder folder;
  const auto rendered = [&](const ChatTemplateOptions& options = {}) {
    auto chat = ChatTemplate::load(folder.path());
    EXPECT_TRUE(chat.ok()) << chat.status().message();
    return chat.ok() ? render(**chat, kUser, options) : "";
  };
  EXPECT_EQ(ChatTemplate::load(folder.path()).status().code(), StatusCode::kNotFound);
  folder.write("tokenizer_config.json", R"({"bos_token":"<b>","eos_token":{"content":"<e>"},"pad_token":null,
      "chat_template":"{{bos_token}}{{eos_token}}{{pad_token}}"})");
  EXPECT_EQ(rendered(), "<b><e>");
  folder.write("tokenizer_config.json", R"({"chat_template":[{"name":"default","template":"plain"},
      {"name":"tool_use","template":"tools {{ tools | length }}"}]})");
  EXPECT_EQ(rendered(), "plain");
  EXPECT_EQ(rendered({.tools_json = "[{},{}]"}), "tools 2");
  EXPECT_EQ(rendered({.tools_json = "[]"}), "plain");
  folder.write("chat_template.jinja", "the file {{ eos_token }}");
  folder.write("special_tokens_map.json", R"({"eos_token":{"content":"<older>"}})");
  EXPECT_EQ(rendered(), "the file <older>");
}

TEST(ChatTemplateFilesTest, BadFilesAreNamed) {
  const auto expect_error = [](const std::string& name, const std::string& content, const std::string& part) {
    TemporaryFolder folder;
    folder.write(name, content);
    const auto chat = ChatTemplate::load(folder.path());
    ASSERT_FALSE(chat.ok());
    EXPECT_EQ(chat.status().code(), StatusCode::kInvalidArgument) << chat.status().message();
    EXPECT_NE(chat.status().message().find(name), std::string::npos) << chat.status().message();
    EXPECT_NE(chat.status().message().find(part), std::string::npos) << chat.status().message();
  };
  expect_error("chat_template.jinja", "line one\n{% if %}", "line 2");
  expect_error("chat_template.jinja", "{% unknown_tag %}", "unknown_tag");
  expect_error("chat_template.jinja", "\xFF\xFE", "UTF-8");
  expect_error("chat_template.jinja", std::string(2 << 20, 'x'), "longer than");
  expect_error("tokenizer_config.json", "{", "not JSON");
  expect_error("tokenizer_config.json", "[1]", "object");
  expect_error("tokenizer_config.json", R"({"chat_template":3})", "chat_template must be");
  expect_error("tokenizer_config.json", R"({"chat_template":[{"name":"rag","template":"x"}]})", "default");
  expect_error("tokenizer_config.json", R"({"chat_template":[{"name":"rag"}]})", "{name, template}");
}

TEST(ChatTemplateFilesTest, FollowsSymbolicLinks) {
  TemporaryFolder blobs, snapshot;
  blobs.write("0a1b", "linked");
  std::filesystem::create_symlink(blobs.file("0a1b"), snapshot.file("chat_template.jinja"));
  auto chat = ChatTemplate::load(snapshot.path());
  ASSERT_TRUE(chat.ok()) << chat.status().message();
  EXPECT_EQ(render(**chat, kUser), "linked");
}

}  // namespace
}  // namespace moed
