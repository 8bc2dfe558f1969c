// What a device does alone and at once: copies up and down, products, experts, launches, and how far a copy hides
// behind a product. usage: gpu_probe DEVICE JSON [--tiny]. Exits 1 where a GPU does not copy while it computes.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/ops.h"

namespace moed {
namespace {

using Json = nlohmann::ordered_json;

// A copy that hides behind a product by less than this share of the shorter of the two means that they take turns.
constexpr double kOverlapMin = 0.7;
constexpr int kRepeats = 5;

struct Sizes {
  int32_t hidden = 4096;
  int32_t intermediate = 14336;
  int32_t num_experts = 8;
  int32_t many_rows = 4096;
  int64_t packet_bytes = int64_t{16} << 20;
  int num_packets = 32;
  int num_launches = 2000;
};

Sizes tiny() {
  return {.hidden = 64,
          .intermediate = 96,
          .num_experts = 4,
          .many_rows = 64,
          .packet_bytes = 1 << 16,
          .num_packets = 4,
          .num_launches = 20};
}

class Probe {
 public:
  Probe(Device& device, const Sizes& sizes) : device_(device), sizes_(sizes) {
    for (int i = 0; i < 2; ++i) streams_.push_back(device.make_stream());
    for (int i = 0; i < 4; ++i) events_.push_back(device.make_timed_event());
    const int64_t rows = sizes.many_rows;
    weights_ = buffer(int64_t{sizes.hidden} * sizes.intermediate * 2);
    x_ = buffer(rows * std::max(sizes.hidden, sizes.intermediate) * 2);
    y_ = buffer(rows * std::max(sizes.hidden, sizes.intermediate) * 4);
    target_ = buffer(sizes.packet_bytes);
    source_ = device.allocate(sizes.packet_bytes, Memory::kPinned).value();
    write_random();
  }

  Status reserve() {
    return device_.ops().reserve({.rows = sizes_.many_rows,
                                  .hidden = sizes_.hidden,
                                  .intermediate = sizes_.intermediate,
                                  .num_heads = 1,
                                  .head_dim = 64,
                                  .context_tokens = 64,
                                  .num_experts = sizes_.num_experts,
                                  .choices = 2});
  }

  // save: after each group, so that what was found outlives what fails later.
  void run(Json& json, const std::function<void()>& save) {
    json["copy_up_gb_per_s"] = copied_gb() / seconds([&] { copies(*streams_[0], true); });
    json["copy_down_gb_per_s"] = copied_gb() / seconds([&] { copies(*streams_[0], false); });
    save();
    overlap(json);
    save();
    const double weights_gb = static_cast<double>(sizes_.hidden) * sizes_.intermediate * 2e-9;
    json["linear_1_row_gb_per_s"] = weights_gb / seconds([&] { product(1); });
    for (const int32_t rows : {4, 8, 16, 32}) {
      json["linear_" + std::to_string(rows) + "_rows_gb_per_s"] = weights_gb / seconds([&] { product(rows); });
    }
    const double flops = 2e-12 * sizes_.many_rows * sizes_.hidden * sizes_.intermediate;
    json["linear_many_rows"] = sizes_.many_rows;
    json["linear_many_rows_tflop_per_s"] = flops / seconds([&] { product(sizes_.many_rows); });
    json["launch_us"] = 1e6 / sizes_.num_launches * seconds([&] { launches(); });
    save();
    experts(json);
    save();
  }

 private:
  Buffer buffer(int64_t bytes) { return device_.allocate(bytes, Memory::kDevice).value(); }

  // Products of zeros take less power than others, and so run at clocks that no model sees.
  void write_random() {
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
    for (int64_t i = 0; i < source_.size() / 2; ++i) source_.as<Bf16>()[i] = Bf16(uniform(random));
    fill(weights_);
    fill(x_);
  }

  // Waits for what the first stream was given.
  void finish() {
    streams_[0]->record(*events_[0]);
    check(events_[0]->join());
  }

  // With what the source holds, again and again.
  void fill(const Buffer& buffer) {
    for (int64_t done = 0; done < buffer.size(); done += source_.size()) {
      streams_[0]->copy(buffer.data() + done, source_.data(), std::min(source_.size(), buffer.size() - done));
    }
    finish();
  }

  // To where the engine has what a layer's router said.
  Buffer upload(const std::vector<int32_t>& numbers) {
    const auto bytes = static_cast<int64_t>(numbers.size() * sizeof(int32_t));
    Buffer to = buffer(bytes);
    streams_[0]->copy(to.data(), numbers.data(), bytes);
    finish();
    return to;
  }

  double copied_gb() const { return 1e-9 * static_cast<double>(sizes_.packet_bytes) * sizes_.num_packets; }

  // The best of some runs of what `enqueue` puts on the first stream, or on both.
  template <class Enqueue>
  double seconds(Enqueue enqueue) {
    double best = INFINITY;
    for (int i = 0; i <= kRepeats; ++i) {
      streams_[0]->record(*events_[0]);
      streams_[1]->wait(*events_[0]);
      enqueue();
      streams_[1]->record(*events_[1]);
      streams_[0]->wait(*events_[1]);
      streams_[0]->record(*events_[2]);
      check(events_[2]->join());
      check(events_[0]->join());
      // The first run finds cold caches and kernels that are not chosen yet.
      if (i > 0) best = std::min(best, 1e-6 * events_[2]->us_since(*events_[0]));
    }
    return best;
  }

  static void check(const Status& status) {
    if (status.ok()) return;
    std::fprintf(stderr, "gpu_probe: %s\n", status.message().c_str());
    std::exit(1);
  }

  void copies(Stream& stream, bool up) {
    for (int i = 0; i < sizes_.num_packets; ++i) {
      stream.copy(up ? target_.data() : source_.data(), up ? source_.data() : target_.data(), sizes_.packet_bytes);
    }
  }

  void product(int32_t rows) {
    const LinearWeights weights{weights_.as<Bf16>(), nullptr, sizes_.hidden, sizes_.intermediate};
    device_.ops().linear({x_.as<Bf16>(), rows, sizes_.hidden}, weights, false,
                         {y_.as<float>(), rows, sizes_.intermediate}, *streams_[0]);
  }

  // As many products of many rows as take about the time of the copies.
  void products(int count) {
    for (int i = 0; i < count; ++i) product(sizes_.many_rows);
  }

  void launches() {
    for (int i = 0; i < sizes_.num_launches; ++i) {
      device_.ops().move({x_.as<Bf16>(), 1, 64}, {y_.as<Bf16>(), 1, 64}, *streams_[0]);
    }
  }

  // All experts of a layer with two rows each (decode), and with many.
  void experts(Json& json) {
    const BlobShape shape{.hidden = sizes_.hidden, .intermediate = sizes_.intermediate};
    const Buffer blobs = buffer(shape.bytes() * sizes_.num_experts);
    fill(blobs);
    const Buffer table = device_.allocate(8 * sizes_.num_experts, Memory::kMapped).value();
    for (int32_t i = 0; i < sizes_.num_experts; ++i) {
      table.as<const std::byte*>()[i] = blobs.data() + i * shape.bytes();
    }
    for (const int32_t rows_each : {2, sizes_.many_rows / sizes_.num_experts}) {
      const int32_t pairs = rows_each * sizes_.num_experts;
      std::vector<int32_t> starts(sizes_.num_experts + 1);
      for (int32_t i = 0; i <= sizes_.num_experts; ++i) starts[i] = i * rows_each;
      std::vector<int32_t> all(pairs);
      std::iota(all.begin(), all.end(), 0);
      const Buffer offsets = upload(starts);
      const Buffer order = upload(all);
      const Buffer scratch = buffer(int64_t{pairs} * sizes_.intermediate * 2);
      ExpertFfn ffn;
      ffn.x = {x_.as<Bf16>(), pairs, sizes_.hidden};
      ffn.shape = shape;
      ffn.blobs = {table.as<const std::byte*>(), static_cast<size_t>(sizes_.num_experts)};
      ffn.offsets = offsets.as<int32_t>();
      ffn.pairs = order.as<int32_t>();
      ffn.pairs_max = pairs;
      ffn.scratch = {scratch.as<Bf16>(), pairs, sizes_.intermediate};
      ffn.y = {y_.as<float>(), pairs, sizes_.hidden};
      const double taken = seconds([&] { device_.ops().expert_ffn(ffn, *streams_[0]); });
      if (rows_each == 2) {
        json["experts_2_rows_gb_per_s"] = 1e-9 * static_cast<double>(shape.bytes() * sizes_.num_experts) / taken;
      } else {
        json["experts_many_rows_tflop_per_s"] = 6e-12 * pairs * sizes_.hidden * sizes_.intermediate / taken;
      }
    }
  }

  void overlap(Json& json) {
    const double copy_s = seconds([&] { copies(*streams_[1], true); });
    const int count = std::max(1, static_cast<int>(copy_s / seconds([&] { product(sizes_.many_rows); })));
    const double product_s = seconds([&] { products(count); });
    const double both_s = seconds([&] {
      copies(*streams_[1], true);
      products(count);
    });
    json["overlap"] = {{"copy_ms", 1e3 * copy_s},
                       {"product_ms", 1e3 * product_s},
                       {"both_ms", 1e3 * both_s},
                       {"hidden_share", (copy_s + product_s - both_s) / std::min(copy_s, product_s)}};
  }

  Device& device_;
  const Sizes sizes_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<std::unique_ptr<Event>> events_;
  Buffer weights_, x_, y_, target_, source_;
};

int run(const std::string& spec, const std::string& path, bool is_tiny) {
  auto device = open_device(spec, {});
  if (!device.ok()) {
    std::fprintf(stderr, "gpu_probe: %s\n", device.status().message().c_str());
    return 1;
  }
  Probe probe(**device, is_tiny ? tiny() : Sizes{});
  const Status reserved = probe.reserve();
  if (!reserved.ok()) {
    std::fprintf(stderr, "gpu_probe: %s\n", reserved.message().c_str());
    return 1;
  }
  Json json = {{"device", std::string((*device)->description())}, {"spec", spec}, {"tiny", is_tiny}};
  probe.run(json, [&] { std::ofstream(path) << json.dump(2) << "\n"; });
  std::printf("%s\n", json.dump(2).c_str());
  // An emulated device has no time of its own.
  const bool has_time = spec.starts_with("cuda");
  return has_time && json["overlap"]["hidden_share"].get<double>() < kOverlapMin ? 1 : 0;
}

}  // namespace
}  // namespace moed

int main(int argc, char** argv) {
  const bool is_tiny = argc == 4 && std::string_view(argv[3]) == "--tiny";
  if (argc != 3 && !is_tiny) {
    std::fputs("usage: gpu_probe DEVICE JSON [--tiny]\n", stderr);
    return 2;
  }
  return moed::run(argv[1], argv[2], is_tiny);
}
