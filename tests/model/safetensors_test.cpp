#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "model/convert.h"
#include "model/tensor_source.h"
#include "tests/model/checkpoint_writer.h"

namespace moed {
namespace {

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::string error_of(const std::string& file_bytes) {
  TemporaryFolder folder;
  write_file(folder.file("model.safetensors"), file_bytes);
  const auto source = open_checkpoint(folder.path());
  if (source.ok()) return "";
  EXPECT_EQ(source.status().code(), StatusCode::kInvalidArgument);
  return source.status().message();
}

TEST(Safetensors, ReadsWhatWasWritten) {
  TemporaryFolder folder;
  const std::vector<uint16_t> bits = {0x3f80, 0xc000, 0x0000, 0x8000, 0x7f80, 0x0001};
  const std::vector<float> floats = {1.0F, -2.5F, 3.14159274F, 1e-40F};
  write_file(folder.file("model.safetensors"), safetensors_bytes({{"b", "BF16", {2, 3}, bytes_of(bits)},
                                                                  {"a", "F32", {4}, bytes_of(floats)},
                                                                  {"empty", "F32", {0, 7}, ""},
                                                                  {"scalar", "F32", {}, bytes_of(std::vector{7.0F})}}));
  const auto source = open_checkpoint(folder.path());
  ASSERT_TRUE(source.ok()) << source.status().message();
  const TensorSource& tensors = **source;
  EXPECT_EQ(tensors.names(), (std::vector<std::string>{"a", "b", "empty", "scalar"}));
  EXPECT_EQ(*tensors.shape("b"), (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(tensors.shape("c"), nullptr);
  EXPECT_TRUE(tensors.rounds());
  std::vector<Bf16> b(6);
  ASSERT_TRUE(tensors.read("b", std::span(b)).ok());
  for (size_t i = 0; i < bits.size(); ++i) EXPECT_EQ(b[i].bits, bits[i]);
  std::vector<float> a(4), one(1);
  ASSERT_TRUE(tensors.read("a", std::span(a)).ok());
  EXPECT_EQ(a, floats);
  std::vector<Bf16> rounded(4);
  ASSERT_TRUE(tensors.read("a", std::span(rounded)).ok());
  EXPECT_EQ(rounded[2].bits, 0x4049);
  std::vector<float> wide(6);
  ASSERT_TRUE(tensors.read("b", std::span(wide)).ok());
  EXPECT_EQ(wide[1], -2.0F);
  EXPECT_TRUE(std::isinf(wide[4]));
  ASSERT_TRUE(tensors.read("scalar", std::span(one)).ok());
  EXPECT_EQ(one[0], 7.0F);
  EXPECT_TRUE(tensors.read("empty", std::span<float>()).ok());
  EXPECT_EQ(tensors.read("c", std::span(one)).message(), "tensor c is missing");
}

// Value by value, by the definition of IEEE 754's binary16.
TEST(Safetensors, HalvesAreExact) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 0x1f);
    const double fraction = static_cast<double>(bits & 0x3ff) / 1024.0;
    double want = exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1.0 + fraction, exponent - 15);
    if (exponent == 31) want = (bits & 0x3ff) == 0 ? INFINITY : NAN;
    if ((bits & 0x8000) != 0) want = -want;
    const float found = float_of_half(static_cast<uint16_t>(bits));
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(found)) << bits;
    } else {
      ASSERT_EQ(found, want) << bits;
      ASSERT_EQ(std::signbit(found), (bits & 0x8000) != 0) << bits;
    }
  }
}

TEST(Safetensors, ConvertsLongTensorsOfEachDtype) {
  TemporaryFolder folder;
  constexpr size_t kElements = 700'001;  // more than one conversion buffer, and no multiple of anything
  std::mt19937 random(1);
  std::vector<uint16_t> halves(kElements);
  std::vector<float> floats(kElements);
  for (size_t i = 0; i < kElements; ++i) {
    halves[i] = static_cast<uint16_t>(random()) & 0xbfff;  // finite
    floats[i] = std::ldexp(static_cast<float>(static_cast<int32_t>(random())), -20);
  }
  write_file(folder.file("model.safetensors"),
             safetensors_bytes({{"half", "F16", {static_cast<int64_t>(kElements)}, bytes_of(halves)},
                                {"float", "F32", {static_cast<int64_t>(kElements)}, bytes_of(floats)}}));
  const auto source = open_checkpoint(folder.path());
  ASSERT_TRUE(source.ok()) << source.status().message();
  std::vector<float> wide(kElements);
  std::vector<Bf16> narrow(kElements);
  ASSERT_TRUE((*source)->read("half", std::span(wide)).ok());
  ASSERT_TRUE((*source)->read("half", std::span(narrow)).ok());
  for (size_t i = 0; i < kElements; ++i) {
    ASSERT_EQ(wide[i], float_of_half(halves[i])) << i;
    ASSERT_EQ(narrow[i], Bf16(wide[i])) << i;
  }
  ASSERT_TRUE((*source)->read("float", std::span(wide)).ok());
  ASSERT_TRUE((*source)->read("float", std::span(narrow)).ok());
  EXPECT_EQ(wide, floats);
  for (size_t i = 0; i < kElements; ++i) ASSERT_EQ(narrow[i], Bf16(floats[i])) << i;
}

TEST(Safetensors, OnlyBf16DoesNotRound) {
  TemporaryFolder folder;
  write_file(folder.file("model.safetensors"),
             safetensors_bytes({{"b", "BF16", {1}, "ab"}, {"position_ids", "I64", {1}, "12345678"}}));
  const auto source = open_checkpoint(folder.path());
  ASSERT_TRUE(source.ok()) << source.status().message();
  EXPECT_FALSE((*source)->rounds());
  std::vector<float> out(1);
  EXPECT_EQ((*source)->read("position_ids", std::span(out)).message(),
            "model.safetensors: tensor position_ids has dtype I64, want BF16, F16 or F32");
}

TEST(Safetensors, BadHeadersAreRefused) {
  const auto with = [](const std::string& header, const std::string& data) {
    return error_of(safetensors_bytes(header, data));
  };
  const auto tensor = [](const std::string& entry) { return fmt::format(R"({{"x": {}}})", entry); };
  const std::string at = "model.safetensors: tensor x: ";
  EXPECT_EQ(error_of(""), "model.safetensors: 0 bytes are no safetensors file");
  EXPECT_EQ(error_of("1234567"), "model.safetensors: 7 bytes are no safetensors file");
  EXPECT_EQ(error_of(std::string(8, '\xff')),
            "model.safetensors: says that its header has 18446744073709551615 bytes, want at most 0");
  EXPECT_EQ(error_of(std::string("\x03\0\0\0\0\0\0\0{}", 10)),
            "model.safetensors: says that its header has 3 bytes, want at most 2");
  EXPECT_EQ(error_of(std::string(8, '\0')), "model.safetensors: its header does not begin with {");
  EXPECT_EQ(with("[]", ""), "model.safetensors: its header does not begin with {");
  EXPECT_EQ(with(" {}", ""), "model.safetensors: its header does not begin with {");
  EXPECT_EQ(with("{", ""), "model.safetensors: header: not valid JSON at byte 2");
  EXPECT_EQ(with(R"({"x": 1})", ""), at + "its entry is no object");
  EXPECT_EQ(with(R"({"x": {}, "x": {}})", ""), "model.safetensors: header: the key \"x\" stands twice");
  EXPECT_EQ(with(tensor("{}"), ""), at + "dtype is absent, want BF16, F16 or F32");
  EXPECT_EQ(with(tensor(R"({"dtype": "Q4"})"), ""), at + "dtype is \"Q4\", want BF16, F16 or F32");
  EXPECT_EQ(with(tensor(R"({"dtype": 7})"), ""), at + "dtype is 7, want a string");
  EXPECT_EQ(with(tensor(R"({"dtype": "F32"})"), ""), at + "shape is absent, want a list of non-negative integers");
  EXPECT_EQ(with(tensor(R"({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]})"), "1234"),
            at + "shape is [-1], want a list of non-negative integers");
  EXPECT_EQ(with(tensor(R"({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]})"), "1234"),
            at + "shape is [1.0], want a list of non-negative integers");
  EXPECT_EQ(with(tensor(R"({"dtype": "F32", "shape": [18446744073709551615], "data_offsets": [0, 4]})"), "1234"),
            at + "shape is [18446744073709551615], want a list of non-negative integers");
  EXPECT_EQ(with(tensor(R"({"dtype": "F32", "shape": [1]})"), "1234"),
            at + "data_offsets is absent, want a list of non-negative integers");
  for (const char* offsets : {"[0]", "[4, 0]", "[0, 8]", "[0, 2, 4]"}) {
    const std::string error =
        with(tensor(fmt::format(R"({{"dtype": "F32", "shape": [1], "data_offsets": {}}})", offsets)), "1234");
    EXPECT_EQ(error, at + "data_offsets is " + offsets + ", want [begin, end] within the file's 4 bytes of data");
  }
  EXPECT_EQ(with(tensor(R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]})"), "1234"),
            at + "shape [2] of F32 does not make the 4 bytes of data_offsets [0, 4]");
  // 2^62 * 4 bytes wraps to 0, 2^32 * 2^32 * 4 too.
  EXPECT_NE(with(tensor(R"({"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 0]})"), "")
                .find("does not make"),
            std::string::npos);
  EXPECT_NE(with(tensor(R"({"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]})"), "")
                .find("does not make"),
            std::string::npos);
}

TEST(Safetensors, OverlapsHolesAndTailsAreRefused) {
  const auto two = [](const char* first, const char* second, const std::string& data) {
    constexpr const char* kEntry = R"({{"dtype": "U8", "shape": [4], "data_offsets": {}}})";
    return error_of(safetensors_bytes(
        fmt::format(R"({{"x": {}, "y": {}}})", fmt::format(kEntry, first), fmt::format(kEntry, second)), data));
  };
  EXPECT_EQ(two("[0, 4]", "[4, 8]", "12345678"), "");
  EXPECT_EQ(two("[4, 8]", "[0, 4]", "12345678"), "");
  EXPECT_EQ(two("[0, 4]", "[2, 6]", "123456"),
            "model.safetensors: tensor y begins at byte 2 of the data, want 4: tensors overlap");
  EXPECT_EQ(two("[0, 4]", "[0, 4]", "1234"),
            "model.safetensors: tensor y begins at byte 0 of the data, want 4: tensors overlap");
  EXPECT_EQ(two("[0, 4]", "[5, 9]", "123456789"),
            "model.safetensors: tensor y begins at byte 5 of the data, want 4: tensors leave a hole");
  EXPECT_EQ(two("[1, 5]", "[5, 9]", "123456789"),
            "model.safetensors: tensor x begins at byte 1 of the data, want 0: tensors leave a hole");
  EXPECT_NE(two("[0, 4]", "[4, 8]", "123456789").find("tensors end at byte"), std::string::npos);
}

// Whatever a byte of the header is changed to, opening answers with a source or an error.
TEST(Safetensors, SurvivesChangedBytes) {
  const std::string good = safetensors_bytes({{"x", "F32", {2}, "12345678"}, {"y", "BF16", {1, 2}, "1234"}});
  TemporaryFolder folder;
  int64_t refused = 0;
  for (size_t at = 0; at + 12 < good.size(); ++at) {
    for (const char byte : {'0', '9', '"', '}', '[', '\0', '\x7f', '\xff'}) {
      std::string bytes = good;
      bytes[at] = byte;
      write_file(folder.file("model.safetensors"), bytes);
      refused += open_checkpoint(folder.path()).ok() ? 0 : 1;
    }
  }
  EXPECT_GT(refused, 500);
}

std::string index_of(const std::string& map) {
  return fmt::format(R"({{"metadata": {{"total_size": 12}}, "weight_map": {}}})", map);
}

TEST(Shards, AreReadByTheIndexThroughSymlinks) {
  TemporaryFolder blobs, folder;
  write_file(blobs.file("blob1"), safetensors_bytes({{"x", "F32", {2}, bytes_of(std::vector{1.0F, 2.0F})}}));
  write_file(folder.file("second.safetensors"),
             safetensors_bytes({{"y", "F32", {1}, bytes_of(std::vector{3.0F})}, {"unnamed", "F32", {1}, "1234"}}));
  std::filesystem::create_symlink(blobs.file("blob1"), folder.file("first.safetensors"));
  write_file(folder.file("model.safetensors.index.json"),
             index_of(R"({"x": "first.safetensors", "y": "second.safetensors"})"));
  const auto source = open_checkpoint(folder.path());
  ASSERT_TRUE(source.ok()) << source.status().message();
  EXPECT_EQ((*source)->names(), (std::vector<std::string>{"x", "y"}));
  std::vector<float> x(2), y(1);
  ASSERT_TRUE((*source)->read("x", std::span(x)).ok());
  ASSERT_TRUE((*source)->read("y", std::span(y)).ok());
  EXPECT_EQ(x[1], 2.0F);
  EXPECT_EQ(y[0], 3.0F);
  const std::vector<int64_t> wanted = {3};
  EXPECT_EQ((*source)->check("y", wanted).message(), "second.safetensors: tensor y has shape [1], want [3]");
}

TEST(Shards, BadIndexesAreRefused) {
  TemporaryFolder folder;
  write_file(folder.file("a.safetensors"), safetensors_bytes({{"x", "F32", {1}, "1234"}}));
  const auto error = [&](const std::string& index) {
    write_file(folder.file("model.safetensors.index.json"), index);
    const auto source = open_checkpoint(folder.path());
    return source.ok() ? "" : source.status().message();
  };
  const std::string at = "model.safetensors.index.json: ";
  EXPECT_EQ(error(index_of(R"({"x": "a.safetensors"})")), "");
  EXPECT_EQ(error("[]"), at + "want an object weight_map from tensors to files");
  EXPECT_EQ(error("{}"), at + "want an object weight_map from tensors to files");
  EXPECT_EQ(error(index_of("{}")), at + "want an object weight_map from tensors to files");
  EXPECT_EQ(error("nonsense"), at + "not valid JSON at byte 2");
  EXPECT_EQ(error(index_of(R"({"x": "a.safetensors", "x": "a.safetensors"})")), at + "the key \"x\" stands twice");
  for (const char* name :
       {"\"../a.safetensors\"", "\"/etc/passwd\"", "\"sub/a\"", "\"..\"", "\".\"", "\"\"", "7", "\"a\\u0000b\""}) {
    EXPECT_EQ(error(index_of(fmt::format(R"({{"x": {}}})", name))),
              at + "tensor x lies in " + name + ", want the name of a file of the same folder");
  }
  EXPECT_EQ(error(index_of(R"({"z": "a.safetensors"})")),
            at + "tensor z is said to lie in a.safetensors, which lacks it");
  EXPECT_EQ(error(index_of(R"({"x": "b.safetensors"})")), folder.file("b.safetensors") + ": No such file or directory");
}

TEST(Checkpoint, FoldersThatHoldNone) {
  TemporaryFolder folder;
  EXPECT_EQ(open_checkpoint(folder.path()).status().message(),
            folder.path() + ": holds neither model.safetensors nor model.safetensors.index.json");
  EXPECT_EQ(open_checkpoint(folder.file("nowhere")).status().message(), folder.file("nowhere") + ": not a folder");
  std::filesystem::create_directory(folder.file("model.safetensors"));
  EXPECT_EQ(open_checkpoint(folder.path()).status().message(),
            folder.file("model.safetensors") + ": not a regular file");
  std::filesystem::remove(folder.file("model.safetensors"));
  ASSERT_EQ(mkfifo(folder.file("model.safetensors").c_str(), 0600), 0);
  EXPECT_EQ(open_checkpoint(folder.path()).status().message(),
            folder.file("model.safetensors") + ": not a regular file");
}

TEST(Checkpoint, FileThatShrinksIsAnError) {
  TemporaryFolder folder;
  write_file(folder.file("model.safetensors"), safetensors_bytes({{"x", "BF16", {50000}, std::string(100000, 'x')}}));
  const auto source = open_checkpoint(folder.path());
  ASSERT_TRUE(source.ok());
  std::filesystem::resize_file(folder.file("model.safetensors"), 20000);
  std::vector<Bf16> out(50000);
  EXPECT_EQ((*source)->read("x", std::span(out)).message(),
            "model.safetensors: ends at byte 20000: it shrank while it was read");
}

TEST(Checkpoint, ThreadsReadAtOnce) {
  TemporaryFolder folder;
  std::vector<WrittenTensor> written;
  for (int i = 0; i < 16; ++i) {
    written.push_back(
        {fmt::format("t{}", i), "F32", {10000}, bytes_of(std::vector<float>(10000, static_cast<float>(i)))});
  }
  write_file(folder.file("model.safetensors"), safetensors_bytes(written));
  const auto source = open_checkpoint(folder.path());
  ASSERT_TRUE(source.ok());
  std::vector<std::vector<float>> out(16, std::vector<float>(10000));
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (int i = t; i < 16; i += 4) EXPECT_TRUE((*source)->read(fmt::format("t{}", i), std::span(out[i])).ok());
      });
    }
  }
  for (int i = 0; i < 16; ++i) EXPECT_EQ(out[i], std::vector<float>(10000, static_cast<float>(i)));
}

}  // namespace
}  // namespace moed
