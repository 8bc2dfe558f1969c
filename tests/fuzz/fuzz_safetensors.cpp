// model.safetensors and its index as anybody may write them: what opens can be read in full, and nothing beyond it.
// The first byte says what follows: '0' a whole file, '1' how many bytes of data there are, then a header whose length
// is put before it, '2' an index beside one good shard.
#include <vector>

#include "model/architectures.h"
#include "tests/fuzz/fuzz.h"

namespace moed {
namespace {

constexpr char kFile[] = "model.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";

std::string file_of(std::string_view header, size_t data_bytes) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(static_cast<uint64_t>(header.size()) >> (8 * i));
  bytes += header;
  for (size_t i = 0; i < data_bytes; ++i) bytes += static_cast<char>(i);
  return bytes;
}

void read_all(const TensorSource& source, size_t bytes) {
  for (const std::string& name : source.names()) {
    const std::vector<int64_t>* shape = source.shape(name);
    MOED_CHECK(shape != nullptr) << "a tensor without a shape";
    size_t elements = 1;
    for (const int64_t size : *shape) {
      MOED_CHECK(size >= 0 && !__builtin_mul_overflow(elements, static_cast<size_t>(size), &elements)) << "a shape";
    }
    MOED_CHECK(elements <= bytes) << elements << " elements in a file of " << bytes << " bytes";
    if (const Status status = source.check(name, *shape); !status.ok()) {
      check_refusal(status);
      continue;
    }
    std::vector<Bf16> narrow(elements);
    std::vector<float> wide(elements);
    MOED_CHECK(source.read(name, std::span<Bf16>(narrow)).ok()) << "cannot read what was checked";
    MOED_CHECK(source.read(name, std::span<float>(wide)).ok()) << "cannot read what was checked";
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TemporaryFolder folder;
  static const std::string shard = file_of(R"({"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},)"
                                           R"("b":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}})",
                                           8);
  std::string_view text = input_text(data, size);
  if (text.size() < 2) return 0;
  const int kind = data[0] % 3;
  size_t bytes = shard.size();
  if (kind == 2) {
    std::filesystem::remove(folder.file(kFile));
    folder.write("s", shard);
    folder.write(kIndex, text.substr(1));
  } else {
    const std::string file = kind == 0 ? std::string(text.substr(1)) : file_of(text.substr(2), data[1]);
    bytes = file.size();
    folder.write(kFile, file);
  }
  const auto source = open_checkpoint(folder.path());
  if (source.ok()) {
    read_all(**source, bytes);
  } else {
    check_refusal(source.status());
  }
  return 0;
}

}  // namespace moed
