#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "scheduler/request.h"

namespace moed {
namespace {

const RequestLimits kLimits{.vocab_size = 100,
                            .max_model_len = 64,
                            .n_max = 4,
                            .new_tokens_max = 50,
                            .logprobs_max = 5,
                            .logit_bias_max = 2,
                            .stop_token_ids_max = 3};

RequestSpec valid() {
  RequestSpec spec;
  spec.id = 1;
  spec.prompt = {1, 2, 3};
  spec.max_tokens = 10;
  return spec;
}

TEST(Request, AcceptsTheBoundsOfEachField) {
  RequestSpec spec = valid();
  spec.n = 4;
  spec.max_tokens = 50;
  spec.prompt.assign(14, 99);
  spec.sampling = {.temperature = 0.0F,
                   .top_k = 0,
                   .top_p = 1.0F,
                   .min_p = 1.0F,
                   .presence_penalty = -2.0F,
                   .frequency_penalty = 2.0F,
                   .logit_bias = {{0, -100.0F}, {99, 100.0F}},
                   .allowed_token_ids = {0, 98},
                   .min_tokens = 50,
                   .num_logprobs = 5};
  spec.stop_token_ids = {0, 1, 99};
  for (const float penalty : {0.01F, 100.0F}) {
    spec.sampling.repetition_penalty = penalty;
    const StatusOr<Request> request = Request::make(spec, kLimits);
    EXPECT_TRUE(request.ok()) << request.status().message();
  }
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
struct Case {
  const char* param;
  std::function<void(RequestSpec&)> spoil;
  const char* text;  // part of the message
};
const Case kRefused[] = {
    {"prompt", [](RequestSpec& s) { s.prompt.clear(); }, "empty"},
    {"prompt", [](RequestSpec& s) { s.prompt[1] = 100; }, "token id 100; the vocabulary has 100"},
    {"prompt", [](RequestSpec& s) { s.prompt[1] = -1; }, "token id -1"},
    {"n", [](RequestSpec& s) { s.n = 0; }, "between 1 and 4"},
    {"n", [](RequestSpec& s) { s.n = 5; }, "between 1 and 4, not 5"},
    {"max_tokens", [](RequestSpec& s) { s.max_tokens = -1; }, "between 0 and 50"},
    {"max_tokens", [](RequestSpec& s) { s.max_tokens = 51; }, "between 0 and 50, not 51"},
    {"temperature", [](RequestSpec& s) { s.sampling.temperature = -0.1F; }, "between 0 and 2, not -0.1"},
    {"temperature", [](RequestSpec& s) { s.sampling.temperature = kNan; }, "nan"},
    {"temperature", [](RequestSpec& s) { s.sampling.temperature = kInf; }, "inf"},
    {"top_p", [](RequestSpec& s) { s.sampling.top_p = 0.0F; }, "above 0"},
    {"top_p", [](RequestSpec& s) { s.sampling.top_p = 1.5F; }, "not 1.5"},
    {"top_p", [](RequestSpec& s) { s.sampling.top_p = kNan; }, "nan"},
    {"min_p", [](RequestSpec& s) { s.sampling.min_p = -1.0F; }, "between 0 and 1"},
    {"top_k", [](RequestSpec& s) { s.sampling.top_k = -2; }, "not -2"},
    {"presence_penalty", [](RequestSpec& s) { s.sampling.presence_penalty = 2.1F; }, "between -2 and 2"},
    {"frequency_penalty", [](RequestSpec& s) { s.sampling.frequency_penalty = kNan; }, "between -2 and 2"},
    {"repetition_penalty", [](RequestSpec& s) { s.sampling.repetition_penalty = 0.0F; }, "between 0.01 and 100, not 0"},
    {"repetition_penalty", [](RequestSpec& s) { s.sampling.repetition_penalty = 1e-38F; }, "not 1e-38"},
    {"repetition_penalty", [](RequestSpec& s) { s.sampling.repetition_penalty = 0.0099F; }, "not 0.0099"},
    {"repetition_penalty", [](RequestSpec& s) { s.sampling.repetition_penalty = 100.1F; }, "not 100.1"},
    {"repetition_penalty", [](RequestSpec& s) { s.sampling.repetition_penalty = kInf; }, "not inf"},
    {"repetition_penalty", [](RequestSpec& s) { s.sampling.repetition_penalty = kNan; }, "nan"},
    {"logprobs", [](RequestSpec& s) { s.sampling.num_logprobs = 6; }, "not 6"},
    {"logit_bias",
     [](RequestSpec& s) {
       s.sampling.logit_bias = {{1, 0}, {2, 0}, {3, 0}};
     },
     "not 3"},
    {"logit_bias",
     [](RequestSpec& s) {
       s.sampling.logit_bias = {{100, 0.0F}};
     },
     "token id 100"},
    {"logit_bias",
     [](RequestSpec& s) {
       s.sampling.logit_bias = {{1, kNan}};
     },
     "nan"},
    {"logit_bias",
     [](RequestSpec& s) {
       s.sampling.logit_bias = {{1, 101.0F}};
     },
     "between -100 and 100"},
    {"allowed_token_ids",
     [](RequestSpec& s) {
       s.sampling.allowed_token_ids = {5, 100};
     },
     "token id 100"},
    {"stop_token_ids",
     [](RequestSpec& s) {
       s.stop_token_ids = {1, 2, 3, 4};
     },
     "not 4"},
    {"stop_token_ids", [](RequestSpec& s) { s.stop_token_ids = {-5}; }, "token id -5"},
    {"min_tokens", [](RequestSpec& s) { s.sampling.min_tokens = 11; }, "max_tokens (10), not 11"},
    {"min_tokens", [](RequestSpec& s) { s.sampling.min_tokens = -1; }, "not -1"},
};

TEST(Request, RefusesEachFieldByName) {
  for (const Case& c : kRefused) {
    RequestSpec spec = valid();
    c.spoil(spec);
    const StatusOr<Request> request = Request::make(spec, kLimits);
    ASSERT_FALSE(request.ok()) << c.param << ": " << c.text;
    EXPECT_EQ(request.status().code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(request.status().param(), c.param) << request.status().message();
    EXPECT_NE(request.status().message().find(c.text), std::string::npos) << request.status().message();
  }
}

TEST(Request, ContextOverflowHasItsOwnCode) {
  RequestSpec spec = valid();
  spec.prompt.assign(60, 1);
  spec.max_tokens = 4;
  EXPECT_TRUE(Request::make(spec, kLimits).ok());
  spec.max_tokens = 5;
  const StatusOr<Request> request = Request::make(spec, kLimits);
  ASSERT_FALSE(request.ok());
  EXPECT_EQ(request.status().detail(), "context_length_exceeded");
  EXPECT_EQ(request.status().message().rfind("This model's maximum context length is 64 tokens", 0), 0U);
  EXPECT_NE(request.status().message().find("65 tokens (60 in the prompt, 5"), std::string::npos);
}

TEST(Request, FillsWhatMinTokensForbids) {
  RequestSpec spec = valid();
  spec.eos_token_ids = {7, 200};  // 200: beyond the logits
  spec.stop_token_ids = {9, 7};
  EXPECT_TRUE(Request::make(spec, kLimits).value().spec().sampling.forbidden_until_min.empty());
  spec.sampling.min_tokens = 3;
  EXPECT_EQ(Request::make(spec, kLimits).value().spec().sampling.forbidden_until_min, (std::vector<int32_t>{7, 9}));
  spec.stop_token_ids = {9};
  spec.ignore_eos = true;  // then EOS is a token like others
  EXPECT_EQ(Request::make(spec, kLimits).value().spec().sampling.forbidden_until_min, (std::vector<int32_t>{9}));
  spec.sampling.allowed_token_ids = {9};
  EXPECT_EQ(Request::make(spec, kLimits).status().param(), "allowed_token_ids");
}

}  // namespace
}  // namespace moed
