#include "server/openai.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "server/openai_answer.h"

namespace moed {
namespace {

using Json = nlohmann::json;

constexpr int64_t kDepth = 64;
const std::string kMessages = R"("messages":[{"role":"user","content":"hi"}])";

StatusOr<OpenAiCall> chat(const std::string& more) {
  return parse_chat_request("{" + kMessages + (more.empty() ? "" : "," + more) + "}", kDepth);
}
StatusOr<OpenAiCall> completion(const std::string& more) {
  return parse_completion_request("{\"prompt\":\"p\"" + (more.empty() ? "" : "," + more) + "}", kDepth);
}

TEST(OpenAiRequest, ChatFieldsArrive) {
  const auto call =
      chat(R"("model":"m","temperature":0,"top_p":0.5,"n":2,"stop":["a","b"],"max_tokens":5,"max_completion_tokens":7,
    "presence_penalty":1,"frequency_penalty":-1,"logit_bias":{"5":-100,"6":1.5},"logprobs":true,"top_logprobs":3,"seed":-4,"stream":true,
    "stream_options":{"include_usage":true,"continuous_usage_stats":true},"user":"u","top_k":-1,"min_p":0.1,"repetition_penalty":1.1,
    "min_tokens":2,"ignore_eos":true,"stop_token_ids":[1,2],"include_stop_str_in_output":true,"allowed_token_ids":[3],
    "truncate_prompt_tokens":9,"chat_template_kwargs":{"z":1,"a":2},"add_generation_prompt":false,"continue_final_message":true,
    "add_special_tokens":true,"skip_special_tokens":false,"priority":-3,"bad_words":["w"],"return_token_ids":true)");
  ASSERT_TRUE(call.ok()) << call.status().message();
  const GenerationParams& p = call->params;
  EXPECT_TRUE(p.chat);
  EXPECT_EQ(p.messages_json, R"([{"role":"user","content":"hi"}])");
  EXPECT_EQ(p.model, "m");
  EXPECT_EQ(p.temperature, 0.0);
  EXPECT_EQ(p.top_p, 0.5);
  EXPECT_EQ(p.n, 2);
  EXPECT_EQ(p.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(p.max_tokens, 7);
  EXPECT_EQ(p.presence_penalty, 1.0);
  EXPECT_EQ(p.frequency_penalty, -1.0);
  EXPECT_EQ(p.logit_bias, (std::vector<std::pair<int64_t, double>>{{5, -100.0}, {6, 1.5}}));
  EXPECT_EQ(p.logprobs, 3);
  EXPECT_EQ(p.seed, -4);
  EXPECT_TRUE(call->stream && call->include_usage && call->continuous_usage);
  EXPECT_EQ(p.top_k, -1);
  EXPECT_EQ(p.min_p, 0.1);
  EXPECT_EQ(p.repetition_penalty, 1.1);
  EXPECT_EQ(p.min_tokens, 2);
  EXPECT_TRUE(p.ignore_eos && p.include_stop_str_in_output && p.continue_final_message);
  EXPECT_EQ(p.stop_token_ids, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(p.allowed_token_ids, (std::vector<int64_t>{3}));
  EXPECT_EQ(p.truncate_prompt_tokens, 9);
  EXPECT_EQ(p.template_kwargs_json, R"({"z":1,"a":2})");
  EXPECT_FALSE(p.add_generation_prompt || p.skip_special_tokens);
  EXPECT_EQ(p.add_special_tokens, true);
  EXPECT_EQ(p.priority, -3);
  EXPECT_EQ(p.bad_words, (std::vector<std::string>{"w"}));
  EXPECT_TRUE(p.return_token_ids);
  EXPECT_TRUE(call->unknown_fields.empty());
}

TEST(OpenAiRequest, NullIsAbsentForEveryField) {
  for (const std::string& name : request_field_names(true)) {
    if (name == "messages") continue;
    const auto call = chat("\"" + name + "\":null");
    ASSERT_TRUE(call.ok()) << name << ": " << call.status().message();
    EXPECT_EQ(call->params.temperature, std::nullopt);
    EXPECT_EQ(call->params.max_tokens, std::nullopt);
    EXPECT_EQ(call->params.n, 1);
    EXPECT_TRUE(call->params.add_generation_prompt && call->params.skip_special_tokens);
    EXPECT_TRUE(call->unknown_fields.empty()) << name;
  }
  for (const std::string& name : request_field_names(false)) {
    if (name == "prompt") continue;
    const auto call = completion("\"" + name + "\":null");
    ASSERT_TRUE(call.ok()) << name << ": " << call.status().message();
    EXPECT_EQ(call->params.logprobs, std::nullopt);
    EXPECT_FALSE(call->params.echo || call->stream);
    EXPECT_TRUE(call->unknown_fields.empty()) << name;
  }
  const auto nested = chat(R"("stream":true,"stream_options":{"include_usage":null,"continuous_usage_stats":null})");
  ASSERT_TRUE(nested.ok()) << nested.status().message();
  EXPECT_FALSE(nested->include_usage || nested->continuous_usage);
}

TEST(OpenAiRequest, AcceptedAsNothing) {
  EXPECT_TRUE(
      chat(R"("tools":[],"tool_choice":"none","response_format":{"type":"text"},"stop":[],"functions":[])").ok());
  EXPECT_TRUE(completion(R"("suffix":"","best_of":1,"use_beam_search":false,"bad_words":[])").ok());
  EXPECT_TRUE(completion(R"("best_of":4,"n":4)").ok());
  EXPECT_TRUE(chat(R"("guided_json":false,"documents":false,"audio":false,"chat_template":"")").ok());
  EXPECT_FALSE(chat(R"("stream":true,"prompt_logprobs":0)")->params.prompt_logprobs.has_value());
  EXPECT_EQ(chat(R"("prompt_logprobs":0)")->params.prompt_logprobs, 0);
  EXPECT_EQ(chat(R"("max_tokens":5.0)")->params.max_tokens, 5);
}

TEST(OpenAiRequest, WrongTypesNameTheField) {
  const std::vector<std::pair<std::string, std::string>> wrong = {{"temperature", "\"hot\""},
                                                                  {"temperature", "true"},
                                                                  {"n", "1.5"},
                                                                  {"n", "\"2\""},
                                                                  {"max_tokens", "99999999999999999999"},
                                                                  {"stop", "5"},
                                                                  {"stop", "[1]"},
                                                                  {"logit_bias", "[1]"},
                                                                  {"logit_bias", "{\"x\":1}"},
                                                                  {"logit_bias", "{\"1\":\"a\"}"},
                                                                  {"logit_bias", "{\"1x\":1}"},
                                                                  {"stream", "1"},
                                                                  {"stream_options", "{}"},
                                                                  {"seed", "\"a\""},
                                                                  {"stop_token_ids", "[\"a\"]"},
                                                                  {"top_logprobs", "2"},
                                                                  {"logprobs", "5"},
                                                                  {"tools", "{}"},
                                                                  {"response_format", "\"text\""},
                                                                  {"chat_template_kwargs", "[]"},
                                                                  {"add_generation_prompt", "\"yes\""},
                                                                  {"model", "5"},
                                                                  {"allowed_token_ids", "3"},
                                                                  {"priority", "\"high\""},
                                                                  {"bad_words", "\"a\""},
                                                                  {"bad_words", "[1]"},
                                                                  {"return_token_ids", "1"}};
  for (const auto& [name, value] : wrong) {
    const auto call = chat("\"" + name + "\":" + value);
    ASSERT_FALSE(call.ok()) << name << " " << value;
    EXPECT_EQ(call.status().code(), StatusCode::kInvalidArgument) << name;
    EXPECT_EQ(call.status().param(), name) << value;
    EXPECT_NE(call.status().message().find(name), std::string::npos);
  }
  EXPECT_EQ(chat(R"("logprobs":true,"top_logprobs":-1)").status().param(), "top_logprobs");
  EXPECT_EQ(completion(R"("logprobs":true)").status().param(), "logprobs");
  EXPECT_EQ(completion(R"("logprobs":-1)").status().param(), "logprobs");
  EXPECT_EQ(parse_chat_request("{}", kDepth).status().param(), "messages");
  EXPECT_EQ(parse_chat_request(R"({"messages":[]})", kDepth).status().param(), "messages");
  EXPECT_STREQ(chat(R"("max_tokens":3)")->params.max_tokens_field, "max_tokens");
  EXPECT_STREQ(chat(R"("max_completion_tokens":3)")->params.max_tokens_field, "max_completion_tokens");
  EXPECT_STREQ(chat("")->params.logprobs_field, "top_logprobs");
  EXPECT_STREQ(completion("")->params.logprobs_field, "logprobs");
  EXPECT_EQ(chat(R"("prompt_logprobs":-1)").status().param(), "prompt_logprobs");
  EXPECT_EQ(chat(R"("stream":true,"prompt_logprobs":1)").status().param(), "prompt_logprobs");
}

TEST(OpenAiRequest, KnownAndNotSupportedIsRefusedNotIgnored) {
  for (const char* const field :
       {R"("tools":[{"type":"function"}])", R"("tool_choice":"auto")", R"("response_format":{"type":"json_object"})",
        R"("use_beam_search":true)", R"("chat_template":"x")", R"("guided_json":{"a":1})",
        R"("structured_outputs":{"regex":"a"})", R"("return_tokens_as_token_ids":true)", R"("echo":true)"}) {
    const auto call = chat(field);
    ASSERT_FALSE(call.ok()) << field;
    EXPECT_EQ(error_reply(call.status()).status, 400) << field;
    EXPECT_FALSE(call.status().param().empty());
    EXPECT_NE(call.status().message().find("not supported"), std::string::npos) << call.status().message();
  }
  EXPECT_FALSE(completion(R"("suffix":"x")").ok());
  EXPECT_FALSE(completion(R"("best_of":3)").ok());
}

// Each row of docs/API.md's table, "| `field` | door | ...", against what the parser asks for.
TEST(OpenAiRequest, TheDocumentListsEveryField) {
  std::ifstream file(std::string(MOED_SOURCE_DIR) + "/docs/API.md");
  std::set<std::string, std::less<>> listed[2];  // completions, chat
  std::map<std::string, std::string> refused;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("## ")) inside = line == "## Request fields";
    if (!inside || !line.starts_with("| `")) continue;
    const size_t end = line.find('`', 3);
    const std::string name = line.substr(3, end - 3);
    const std::string rest = line.substr(end);
    const bool both = rest.starts_with("` | both |");
    EXPECT_TRUE(both || rest.starts_with("` | chat |") || rest.starts_with("` | completions |")) << line;
    if (both || rest.starts_with("` | chat |")) listed[1].insert(name);
    if (both || rest.starts_with("` | completions |")) listed[0].insert(name);
    if (rest.find("| refused") != std::string::npos)
      refused[name] = rest.starts_with("` | completions |") ? "" : "chat";
  }
  EXPECT_EQ(listed[1], request_field_names(true));
  EXPECT_EQ(listed[0], request_field_names(false));
  EXPECT_GE(refused.size(), 10u);
  for (const auto& [name, door] : refused) {
    const bool flag = name.starts_with("use_") || name.starts_with("return_") || name == "echo";
    const std::string field = "\"" + name + "\":" + (flag ? "true" : "{\"a\":1}");
    const auto call = door == "chat" ? chat(field) : completion(field);
    EXPECT_EQ(call.status().param(), name);
    EXPECT_EQ(call.status().detail(), "unsupported_parameter") << name;
  }
}

TEST(OpenAiRequest, PromptsInAllFourShapes) {
  EXPECT_EQ(parse_completion_request(R"({"prompt":"a"})", kDepth)->params.prompts[0].text, "a");
  EXPECT_EQ(parse_completion_request(R"({"prompt":["a","b"]})", kDepth)->params.prompts[1].text, "b");
  const auto ids = parse_completion_request(R"({"prompt":[1,2,3]})", kDepth);
  ASSERT_EQ(ids->params.prompts.size(), 1u);
  EXPECT_EQ(ids->params.prompts[0].ids, (std::vector<int64_t>{1, 2, 3}));
  const auto lists = parse_completion_request(R"({"prompt":[[1,2],[3]]})", kDepth);
  ASSERT_EQ(lists->params.prompts.size(), 2u);
  EXPECT_TRUE(lists->params.prompts[1].is_ids);
  for (const char* const wrong : {"5", "[]", "[1,\"a\"]", "[[1],[]]", "[\"a\",{}]", "{}", "[true]", "[1.5]"}) {
    const auto call = parse_completion_request("{\"prompt\":" + std::string(wrong) + "}", kDepth);
    ASSERT_FALSE(call.ok()) << wrong;
    EXPECT_TRUE(call.status().param().starts_with("prompt")) << wrong;
  }
  EXPECT_EQ(parse_completion_request("{}", kDepth).status().param(), "prompt");
}

TEST(OpenAiRequest, HostileBodies) {
  const std::string secret = "my secret prompt";
  const std::vector<std::string> bodies = {
      "",
      "[]",
      "5",
      "{",
      "{\"messages\": \"" + secret,
      "{\"messages\": [{\"role\":\"user\",\"content\":\"" + secret + "\"]}",
      "{\"a\":\"\xff\xfe " + secret + "\"}",
      "{\"temperature\": NaN}",
      "{\"temperature\": 1e999}",
      "{\"a\":\"\\ud800\"}",
      std::string("{\0}", 3),
      "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}" + std::string(1, '\0') + secret};
  for (const std::string& body : bodies) {
    const auto call = parse_chat_request(body, kDepth);
    ASSERT_FALSE(call.ok()) << body;
    EXPECT_EQ(call.status().code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(call.status().message().find("secret"), std::string::npos) << call.status().message();
  }
  EXPECT_NE(parse_chat_request(std::string(100000, '['), kDepth).status().message().find("64"), std::string::npos);
  EXPECT_NE(parse_chat_request("{\"a\":" + std::string(100000, '['), kDepth).status().message().find("deeper"),
            std::string::npos);
  // Brackets in strings are no depth.
  EXPECT_TRUE(parse_completion_request("{\"prompt\":\"" + std::string(1000, '[') + "\\\"{\"}", kDepth).ok());
  // An object whose keys would take minutes to look up.
  std::string many = "{\"logit_bias\":{";
  for (int i = 0; i < 200000; ++i) many += "\"" + std::to_string(i) + "\":1,";
  many += "\"x\":1}}";
  EXPECT_NE(parse_chat_request(many, kDepth).status().message().find("too many"), std::string::npos);
}

TEST(OpenAiRequest, UnknownFieldsAreNamedEscapedAndBounded) {
  std::string more = "\"bad\\u001b[31mname\":1";
  for (int i = 0; i < 40; ++i) more += ",\"zz" + std::to_string(i) + std::string(200, 'x') + "\":1";
  const auto call = chat(more);
  ASSERT_TRUE(call.ok());
  ASSERT_EQ(call->unknown_fields.size(), 16u);
  EXPECT_EQ(call->unknown_fields[0], "bad\\x1b[31mname");
  EXPECT_LE(call->unknown_fields[1].size(), 64u);
}

TEST(OpenAiErrors, EnvelopeHasStringsAndTheRightStatus) {
  const std::vector<std::pair<StatusCode, int>> codes = {
      {StatusCode::kInvalidArgument, 400},   {StatusCode::kUnauthenticated, 401}, {StatusCode::kNotFound, 404},
      {StatusCode::kResourceExhausted, 429}, {StatusCode::kUnavailable, 503},     {StatusCode::kUnimplemented, 400},
      {StatusCode::kDeadlineExceeded, 408},  {StatusCode::kInternal, 500}};
  for (const auto& [code, http] : codes) {
    const HttpReply reply = error_reply(Status(code, "why \xff", "field", "detail"));
    EXPECT_EQ(reply.status, http);
    const Json error = Json::parse(reply.body)["error"];
    EXPECT_EQ(error["message"], "why \xef\xbf\xbd");
    EXPECT_TRUE(error["type"].is_string());
    EXPECT_EQ(error["param"], "field");
    EXPECT_EQ(error["code"], "detail");
    const bool retry = !reply.headers.empty() && reply.headers[0].first == "Retry-After";
    EXPECT_EQ(retry, http == 429 || http == 503);
  }
  const Json error = Json::parse(error_reply(405, "m").body)["error"];
  EXPECT_TRUE(error["param"].is_null());
  EXPECT_TRUE(error["code"].is_string());
}

TokenText token(int id, const std::string& bytes, std::optional<float> logprob = {}) {
  TokenText out{.token = id, .bytes = bytes, .logprob = logprob};
  if (logprob) out.top = {{7, "best", -0.1F}, {id, bytes, *logprob}, {8, "best", -3.0F}, {9, "rest", -INFINITY}};
  return out;
}

TEST(OpenAiAnswer, PlainChat) {
  auto call = chat(R"("logprobs":true,"top_logprobs":2,"n":2,"stop_token_ids":[42])");
  PlainAnswer answer(*call, {"chatcmpl-1", 17, "m"});
  answer.add({.choice = 1, .text = "<think>Bon</think>", .tokens = {token(3, "Bon", -0.5F)}});
  answer.add({.choice = 0, .text = "He", .tokens = {token(1, "\xe2\x82", -INFINITY)}});
  answer.add({.choice = 0, .text = "y", .tokens = {}, .finish = FinishReason::kStop, .stop_text = "END"});
  answer.add({.choice = 1, .text = "", .finish = FinishReason::kStop, .stop_token = 42});
  const Json json = Json::parse(answer.json({.prompt_tokens = 5, .cached_tokens = 4, .completion_tokens = 3}, 2));
  EXPECT_EQ(json["object"], "chat.completion");
  EXPECT_EQ(json["id"], "chatcmpl-1");
  EXPECT_EQ(json["created"], 17);
  const Json& first = json["choices"][0];
  EXPECT_EQ(first["message"]["content"], "Hey");
  EXPECT_TRUE(first["message"]["refusal"].is_null());
  EXPECT_EQ(first["finish_reason"], "stop");
  EXPECT_EQ(first["stop_reason"], "END");
  const Json& entry = first["logprobs"]["content"][0];
  EXPECT_EQ(entry["logprob"], -9999.0);
  EXPECT_EQ(entry["bytes"], Json::parse("[226,130]"));
  EXPECT_EQ(entry["token"], "\xef\xbf\xbd");
  EXPECT_EQ(entry["top_logprobs"].size(), 2u);
  EXPECT_TRUE(first["logprobs"].contains("refusal") && first["logprobs"]["refusal"].is_null());
  EXPECT_EQ(json["choices"][1]["stop_reason"], 42);
  EXPECT_EQ(json["choices"][1]["message"]["content"], "<think>Bon</think>") << "thoughts stay where they are";
  EXPECT_EQ(json["usage"]["total_tokens"], 8);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
}

TEST(OpenAiAnswer, CompletionLogprobsWithEcho) {
  auto call = completion(R"("logprobs":4,"echo":true)");
  PlainAnswer answer(*call, {"cmpl-1", 17, "m"});
  answer.add({.choice = 0,
              .text = "!",
              .tokens = {token(2, "!", -2.0F)},
              .finish = FinishReason::kLength,
              .has_prompt = true,
              .prompt_text = "é x",
              .prompt_tokens = {token(5, "é"), token(6, " x", -1.0F)}});
  const Json choice = Json::parse(answer.json({}, 1))["choices"][0];
  EXPECT_EQ(choice["text"], "é x!");
  const Json& logprobs = choice["logprobs"];
  EXPECT_EQ(logprobs["tokens"], Json::parse(R"(["é"," x","!"])"));
  EXPECT_EQ(logprobs["token_logprobs"], Json::parse("[null,-1.0,-2.0]"));
  EXPECT_EQ(logprobs["text_offset"], Json::parse("[0,1,3]"));
  EXPECT_TRUE(logprobs["top_logprobs"][0].is_null());
  EXPECT_EQ(logprobs["top_logprobs"][2]["!"], -2.0) << "the chosen token, with the same number";
  EXPECT_FLOAT_EQ(logprobs["top_logprobs"][2]["best"].get<float>(), -0.1F) << "of two that read alike, the better";
  EXPECT_EQ(logprobs["top_logprobs"][2]["rest"], -9999.0);
}

// Several tokens that are parts of characters read alike to a JSON parser: each keeps a name and a number of its own.
TEST(OpenAiAnswer, TokensThatAreNoTextHaveNamesOfTheirOwn) {
  auto call = completion(R"("logprobs":6)");
  PlainAnswer answer(*call, {"cmpl-1", 17, "m"});
  TokenText chosen{.token = 5, .bytes = "\xe2\x82", .logprob = -2.0F};
  chosen.top = {{1, "\xe2", -0.5F},     {2, "\x82", -1.0F},         {3, "\xff", -1.5F},
                {5, "\xe2\x82", -2.0F}, {4, "\xed\xa0\x80", -3.0F}, {6, "€", -4.0F}};
  answer.add({.choice = 0, .text = "", .tokens = {chosen}, .finish = FinishReason::kLength});
  const Json logprobs = Json::parse(answer.json({}, 1))["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["tokens"], Json::parse(R"(["bytes:\\xe2\\x82"])"));
  const Json& top = logprobs["top_logprobs"][0];
  EXPECT_EQ(top.size(), 6U) << top;
  EXPECT_EQ(top["bytes:\\xe2"], -0.5);
  EXPECT_EQ(top["bytes:\\xff"], -1.5);
  EXPECT_EQ(top["bytes:\\xe2\\x82"], -2.0);
  EXPECT_EQ(top["bytes:\\xed\\xa0\\x80"], -3.0) << "a surrogate is no character";
  EXPECT_EQ(top["€"], -4.0);
}

std::vector<Json> events(const std::string& stream) {
  std::vector<Json> out;
  for (size_t at = 0; at < stream.size();) {
    const size_t end = stream.find("\n\n", at);
    EXPECT_EQ(stream.substr(at, 6), "data: ");
    const std::string data = stream.substr(at + 6, end - at - 6);
    out.push_back(data == "[DONE]" ? Json("[DONE]") : Json::parse(data));
    at = end + 2;
  }
  return out;
}

TEST(OpenAiAnswer, ChatStream) {
  auto call = chat(R"("stream":true,"stream_options":{"include_usage":true},"n":2)");
  StreamAnswer answer(*call, {"chatcmpl-1", 17, "m"});
  std::string out;
  answer.add({.choice = 1, .text = "", .tokens = {}}, {},
             out);  // held text: the role goes out, no empty chunk after it
  answer.add({.choice = 1, .text = ""}, {}, out);
  answer.add({.choice = 0, .text = "Hi"}, {}, out);
  answer.add({.choice = 0, .text = "!", .finish = FinishReason::kLength}, {}, out);
  answer.add({.choice = 1, .text = "", .finish = FinishReason::kStop}, {}, out);
  answer.end({.prompt_tokens = 2, .completion_tokens = 3}, out);
  const std::vector<Json> all = events(out);
  ASSERT_EQ(all.size(), 8u) << out;
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(all[i]["id"], "chatcmpl-1");
    EXPECT_EQ(all[i]["object"], "chat.completion.chunk");
    EXPECT_TRUE(all[i].contains("usage") && all[i]["usage"].is_null());
    EXPECT_EQ(all[i]["choices"].size(), 1u);
  }
  EXPECT_EQ(all[0]["choices"][0]["delta"], Json::parse(R"({"role":"assistant","content":""})"));
  EXPECT_EQ(all[0]["choices"][0]["index"], 1);
  EXPECT_EQ(all[1]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(all[2]["choices"][0]["delta"], Json::parse(R"({"content":"Hi"})"));
  EXPECT_EQ(all[3]["choices"][0]["delta"]["content"], "!");
  EXPECT_TRUE(all[3]["choices"][0]["finish_reason"].is_null());
  EXPECT_EQ(all[4]["choices"][0]["delta"], Json::object());
  EXPECT_EQ(all[4]["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(all[5]["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(all[6]["choices"], Json::array());
  EXPECT_EQ(all[6]["usage"]["total_tokens"], 5);
  EXPECT_EQ(all[7], "[DONE]");
}

// The score of a token that ended the choice has no text to go with.
TEST(OpenAiAnswer, ChatStreamsHaveNoEmptyChunkForTheStopTokensScore) {
  auto call = chat(R"("stream":true,"logprobs":true)");
  StreamAnswer answer(*call, {"chatcmpl-1", 17, "m"});
  std::string out;
  answer.add({.choice = 0, .text = "a", .tokens = {token(1, "a", -1.0F)}}, {}, out);
  answer.add({.choice = 0, .text = "", .tokens = {token(2, "<eos>", -2.0F)}, .finish = FinishReason::kStop}, {}, out);
  const std::vector<Json> all = events(out);
  ASSERT_EQ(all.size(), 3U) << out;
  EXPECT_EQ(all[1]["choices"][0]["logprobs"]["content"][0]["token"], "a");
  const Json& last = all[2]["choices"][0];
  EXPECT_EQ(last["delta"], Json::object());
  EXPECT_EQ(last["finish_reason"], "stop");
  EXPECT_EQ(last["logprobs"]["content"][0]["logprob"], -2.0);
}

TEST(OpenAiAnswer, StreamsWithoutUsageDoNotMentionIt) {
  auto call = completion(R"("stream":true,"logprobs":1)");
  StreamAnswer answer(*call, {"cmpl-1", 17, "m"});
  std::string out;
  answer.add({.choice = 0, .text = "é", .tokens = {token(1, "é", -1.0F)}}, {}, out);
  answer.add({.choice = 0, .text = ""}, {}, out);
  answer.add({.choice = 0, .text = "b", .tokens = {token(2, "b", -1.0F)}, .finish = FinishReason::kStop}, {}, out);
  answer.end({}, out);
  const std::vector<Json> all = events(out);
  ASSERT_EQ(all.size(), 3u) << out;
  EXPECT_FALSE(all[0].contains("usage"));
  EXPECT_EQ(all[0]["object"], "text_completion");
  EXPECT_EQ(all[1]["choices"][0]["logprobs"]["text_offset"], Json::parse("[1]"));
  EXPECT_EQ(all[1]["choices"][0]["finish_reason"], "stop");
}

TEST(OpenAiAnswer, ContinuousUsage) {
  auto call = chat(R"("stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true})");
  StreamAnswer answer(*call, {"chatcmpl-1", 17, "m"});
  std::string out;
  answer.add({.choice = 0, .text = "a", .num_tokens = 4}, {.prompt_tokens = 2, .completion_tokens = 9}, out);
  EXPECT_EQ(events(out).back()["usage"]["completion_tokens"], 4);
  EXPECT_FALSE(chat(R"("stream":true,"stream_options":{"continuous_usage_stats":true})")->continuous_usage)
      << "it says how usage is told, not that it is";
}

TEST(OpenAiAnswer, PromptLogprobs) {
  auto call = chat(R"("prompt_logprobs":1)");
  PlainAnswer answer(*call, {"chatcmpl-1", 17, "m"});
  answer.add({.choice = 0,
              .text = "a",
              .finish = FinishReason::kStop,
              .has_prompt = true,
              .prompt_text = "p",
              .prompt_tokens = {token(5, "p"), token(6, "q", -1.0F)}});
  const Json json = Json::parse(answer.json({}, 1));
  EXPECT_EQ(json["choices"][0]["message"]["content"], "a");
  EXPECT_TRUE(json["prompt_logprobs"][0].is_null());
  EXPECT_EQ(json["prompt_logprobs"][1]["6"]["logprob"], -1.0);
  EXPECT_EQ(json["prompt_logprobs"][1]["7"]["rank"], 1);
}

// Where vLLM has them: a chat's prompt beside the choices, a completion's within each choice.
TEST(OpenAiAnswer, TokenIds) {
  const Delta first{.choice = 0, .text = "", .token_ids = {1}, .has_prompt = true, .prompt_token_ids = {8, 9}};
  const Delta second{.choice = 0, .text = "ab", .token_ids = {2}};
  const Delta last{.choice = 0, .text = "", .token_ids = {3}, .finish = FinishReason::kStop};
  for (const bool is_chat : {true, false}) {
    const std::string fields = R"("return_token_ids":true)";
    auto call = is_chat ? chat(fields) : completion(fields);
    PlainAnswer plain(*call, {"id", 17, "m"});
    StreamAnswer stream(*call, {"id", 17, "m"});
    std::string out;
    for (const Delta& delta : {first, second, last}) {
      plain.add(delta);
      stream.add(delta, {}, out);
    }
    const Json json = Json::parse(plain.json({}, 1));
    EXPECT_EQ(json["choices"][0]["token_ids"], Json::parse("[1,2,3]"));
    EXPECT_EQ((is_chat ? json : json["choices"][0])["prompt_token_ids"], Json::parse("[8,9]"));
    const std::vector<Json> all = events(out);
    EXPECT_EQ((is_chat ? all[0] : all[0]["choices"][0])["prompt_token_ids"], Json::parse("[8,9]"));
    std::vector<int> ids;
    for (size_t i = 0; i < all.size(); ++i) {
      const Json& choice = all[i]["choices"][0];
      EXPECT_FALSE(i > 0 && (all[i].contains("prompt_token_ids") || choice.contains("prompt_token_ids")));
      if (choice.contains("token_ids")) {
        for (const Json& id : choice["token_ids"]) ids.push_back(id);
      }
    }
    EXPECT_EQ(ids, (std::vector<int>{1, 2, 3}));
    auto without = is_chat ? chat("") : completion("");
    PlainAnswer silent(*without, {"id", 17, "m"});
    silent.add(first);
    EXPECT_EQ(silent.json({}, 1).find("token_ids"), std::string::npos);
  }
}

TEST(OpenAiAnswer, ModelsAndTokens) {
  const ModelInfo model{.names = {"a", "b/c"}, .root = "r", .max_model_len = 10, .created_s = 5};
  const Json list = Json::parse(models_json(model));
  EXPECT_EQ(list["object"], "list");
  EXPECT_EQ(list["data"].size(), 2u);
  EXPECT_EQ(list["data"][1], Json::parse(R"({"id":"b/c","object":"model","created":5,"owned_by":"moed","root":"r",
                                              "parent":null,"max_model_len":10})"));
  EXPECT_EQ(Json::parse(model_json(model, "a"))["object"], "model");
  EXPECT_EQ(Json::parse(tokenize_json({.tokens = {1, 2}, .max_model_len = 9})),
            Json::parse(R"({"count":2,"max_model_len":9,"tokens":[1,2],"token_strs":null})"));
  EXPECT_EQ(Json::parse(detokenize_json("x")), Json::parse(R"({"prompt":"x"})"));
}

}  // namespace
}  // namespace moed
