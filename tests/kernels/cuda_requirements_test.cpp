#include "kernels/cuda/requirements.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/device_kind.h"

namespace moed::cuda {
namespace {

Offer h200() {
  return {.driver_version = 13000,
          .runtime_version = 13000,
          .num_devices = 1,
          .index = 0,
          .name = "NVIDIA H200",
          .major = 9,
          .minor = 0};
}

// Code for 8.0, and PTX.
Compiled ampere() { return parse_architectures("80"); }

void expect_refused(const Offer& offer, const std::string& why, StatusCode code = StatusCode::kUnavailable) {
  const Status status = check_offer(offer, ampere());
  ASSERT_FALSE(status.ok()) << why;
  EXPECT_EQ(status.code(), code) << status.message();
  EXPECT_NE(status.message().find(why), std::string::npos) << status.message();
  EXPECT_EQ(status.message().find('\n'), std::string::npos) << status.message();
  EXPECT_EQ(status.param(), "device");
}

TEST(CudaRequirements, TakesWhatFits) {
  Offer offer = h200();
  EXPECT_TRUE(check_offer(offer, ampere()).ok());
  offer.major = 8;
  offer.minor = 0;
  EXPECT_TRUE(check_offer(offer, ampere()).ok());
  // A driver runs later runtimes of its major version, and all earlier ones.
  offer.minor = 6;
  offer.runtime_version = 13020;
  EXPECT_TRUE(check_offer(offer, ampere()).ok());
  offer.driver_version = 14010;
  EXPECT_TRUE(check_offer(offer, ampere()).ok());
}

TEST(CudaRequirements, SaysWhatIsMissing) {
  Offer offer = h200();
  offer.driver_version = 0;
  offer.num_devices = 0;
  expect_refused(offer, "no NVIDIA driver");

  offer = h200();
  offer.driver_version = 12080;
  offer.num_devices = 0;  // a runtime that refuses its driver counts none
  expect_refused(offer, "runs CUDA up to 12.8");
  expect_refused(offer, "CUDA 13.0 or later");

  offer = h200();
  offer.num_devices = 0;
  expect_refused(offer, "shows no GPU (CUDA_VISIBLE_DEVICES hides some?)");
  offer.refusal = "system not yet initialized (error 802)";
  expect_refused(offer, "shows no GPU (system not yet initialized (error 802))");

  offer = h200();
  offer.name = "Tesla T4";
  offer.major = 7;
  offer.minor = 5;
  expect_refused(offer, "(Tesla T4) has compute capability 7.5");
}

TEST(CudaRequirements, ReadsArchitectures) {
  const Compiled compiled = parse_architectures("80,86-real,120-virtual");
  EXPECT_EQ(compiled.code, (std::vector<int32_t>{80, 86}));
  EXPECT_EQ(compiled.ptx, (std::vector<int32_t>{80, 120}));
  for (const char* text : {"", "native", "all-major", "80,fast", "90a"}) {
    EXPECT_TRUE(parse_architectures(text).code.empty() && parse_architectures(text).ptx.empty()) << text;
  }
}

// A driver translates PTX of toolkits that are no newer than itself, whatever code it runs.
TEST(CudaRequirements, AnOlderDriverTranslatesNothingNewer) {
  const auto refusal = [](const Offer& offer, const char* architectures) {
    return check_offer(offer, parse_architectures(architectures)).message();
  };
  Offer offer = h200();
  offer.runtime_version = 13020;
  EXPECT_NE(refusal(offer, "80").find("translate kernels of CUDA 13.2, but it knows CUDA up to 13.0"),
            std::string::npos)
      << refusal(offer, "80");
  EXPECT_NE(refusal(offer, "80").find("ARCHS=90"), std::string::npos);
  EXPECT_EQ(refusal(offer, "80,90-real"), "");
  EXPECT_EQ(refusal(offer, "native"), "");
  offer.driver_version = 13020;
  EXPECT_EQ(refusal(offer, "80"), "");
  // Code for 9.0 is none for 8.6, nor PTX of it; code for 8.0 is none for 12.0, but its PTX is.
  offer.major = 8;
  offer.minor = 6;
  EXPECT_NE(refusal(offer, "90").find("no kernels"), std::string::npos);
  EXPECT_EQ(refusal(offer, "80-real"), "");
  offer.major = 12;
  offer.minor = 0;
  EXPECT_EQ(refusal(offer, "80"), "");
  EXPECT_NE(refusal(offer, "80-real").find("no kernels"), std::string::npos);
}

TEST(CudaRequirements, RefusesADeviceThatIsNotThere) {
  Offer offer = h200();
  offer.num_devices = 2;
  offer.index = 1;
  EXPECT_TRUE(check_offer(offer, ampere()).ok());
  offer.index = 2;
  expect_refused(offer, "cuda:2: the driver shows 2 GPUs", StatusCode::kInvalidArgument);
}

TEST(CudaRequirements, ReadsTheIndex) {
  EXPECT_EQ(parse_index("0").value(), 0);
  EXPECT_EQ(parse_index("17").value(), 17);
  for (const char* text : {"", "-1", "+1", "1024", "99999999999", "1x", " 1", "0x1"}) {
    const auto index = parse_index(text);
    ASSERT_FALSE(index.ok()) << text;
    EXPECT_EQ(index.status().code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(index.status().param(), "device");
  }
}

// With a driver the device opens; without one, or without CUDA in the build, one line says why not.
TEST(CudaRequirements, OpeningSaysWhyNot) {
  const auto device = open_device("cuda", {.num_threads = 1});
  if (device.ok()) {
    EXPECT_FALSE((*device)->is_host());
    return;
  }
  const std::string& message = device.status().message();
  EXPECT_NE(message.find(cuda_kind() == nullptr ? "`make cuda`" : "device cuda: "), std::string::npos) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

}  // namespace
}  // namespace moed::cuda
