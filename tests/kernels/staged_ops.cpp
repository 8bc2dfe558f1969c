#include "tests/kernels/staged_ops.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "base/check.h"

namespace moed {
namespace {

class Stager : public RangeVisitor {
 public:
  Stager(Device& device, Stream& stream) : device_(device), stream_(stream) {}

  void range(const char*, Access access, const void*& base, Runs runs) override {
    auto* host = static_cast<std::byte*>(const_cast<void*>(base));
    Staged staged;
    staged.host = host;
    staged.begin = INT64_MAX;
    runs([&](int64_t offset, int64_t bytes) {
      staged.begin = std::min(staged.begin, offset);
      staged.end = std::max(staged.end, offset + bytes);
    });
    if (staged.end == 0) return;
    // What lies between the runs of a result must come back as it was.
    staged.image.assign(staged.end, std::byte{0xFF});
    const auto keep = [&](int64_t offset, int64_t bytes) {
      std::memcpy(staged.image.data() + offset, host + offset, bytes);
    };
    if (access == Access::kRead) {
      runs(keep);
    } else {
      staged.comes_back = true;
      keep(staged.begin, staged.end - staged.begin);
    }
    staged.buffer = device_.allocate(staged.end, Memory::kDevice).value();
    base = staged.buffer.data();
    stream_.copy(staged.buffer.data(), staged.image.data(), staged.end);
    staged_.push_back(std::move(staged));
  }

  void table(const char* name, const void*& data, int64_t bytes) override {
    if (bytes == 0) return;
    tables_.push_back(device_.allocate(bytes, Memory::kMapped).value());
    std::memcpy(tables_.back().data(), data, bytes);
    data = tables_.back().data();
    if (name == std::string_view("spans")) next_span_ = tables_.back().as<AttentionSpan>();
    if (name == std::string_view("blocks")) (next_span_++)->blocks = static_cast<const int32_t*>(data);
  }

  void copy_back() {
    for (const Staged& staged : staged_) {
      if (!staged.comes_back) continue;
      stream_.copy(staged.host + staged.begin, staged.buffer.data() + staged.begin, staged.end - staged.begin);
    }
  }

 private:
  struct Staged {
    std::byte* host = nullptr;
    int64_t begin = 0;
    int64_t end = 0;
    bool comes_back = false;
    std::vector<std::byte> image;
    Buffer buffer;
  };
  Device& device_;
  Stream& stream_;
  std::vector<Staged> staged_;
  std::vector<Buffer> tables_;
  AttentionSpan* next_span_ = nullptr;  // of the mapped copy, whose blocks come next
};

}  // namespace

void StagedOps::enqueue(OpCall call, Stream& stream) {
  Stager stager(device_, stream);
  visit_ranges(call, stager);
  run_op(call, device_.ops(), stream);
  stager.copy_back();
  const auto done = device_.make_event();
  stream.record(*done);
  const Status joined = done->join();
  MOED_CHECK(joined.ok()) << joined.message();
}

}  // namespace moed
