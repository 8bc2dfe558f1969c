#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/device.h"
#include "model/architectures.h"
#include "offload/ring.h"
#include "tests/model/checkpoint_writer.h"
#include "tests/support/test_device.h"

namespace moed {

// A small model's experts, a device, a stream that reads them, and where it puts what it has read.
class RingBox {
 public:
  struct Shape {
    int32_t num_layers = 3;
    int32_t num_experts = 5;
    int32_t hidden = 20;
    int32_t intermediate = 12;
    std::string dense_layers;  // "1, 2"
  };

  explicit RingBox(const Shape& shape, const char* device_spec = "emulated", uint64_t seed = 0, double memory_gib = 1.0)
      : model(make_model(shape)), store(load(model)) {
    StatusOr<std::unique_ptr<Device>> opened = open_device(
        test_device(device_spec),
        {.num_threads = 1, .memory_gib = std::string(device_spec) == "cpu" ? 0.0 : memory_gib, .seed = seed});
    MOED_CHECK(opened.ok()) << opened.status().message();
    device = std::move(opened).value();
    reader = device->make_stream();
  }

  StatusOr<std::unique_ptr<ExpertRing>> make(const RingConfig& config) {
    return ExpertRing::make(store, model.config, *device, config);
  }
  std::unique_ptr<ExpertRing> ring(const RingConfig& config) {
    StatusOr<std::unique_ptr<ExpertRing>> made = make(config);
    MOED_CHECK(made.ok()) << made.status().message();
    return std::move(made).value();
  }

  static Model make_model(const Shape& shape) {
    const auto number = [](int32_t value) { return std::to_string(value); };
    StatusOr<Model> model = parse_model_config(
        R"({"architectures": ["Qwen3MoeForCausalLM"], "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": 16, "num_experts_per_tok": 1, "vocab_size": 16, "hidden_size": )" +
            number(shape.hidden) + ", \"moe_intermediate_size\": " + number(shape.intermediate) +
            ", \"num_hidden_layers\": " + number(shape.num_layers) + ", \"num_experts\": " + number(shape.num_experts) +
            ", \"mlp_only_layers\": [" + shape.dense_layers + "]}",
        "");
    MOED_CHECK(model.ok()) << model.status().message();
    return std::move(model).value();
  }
  static ExpertStore load(const Model& model) {
    StatusOr<ExpertStore> store = ExpertStore::load(model, *dummy_weights(model, 7), {});
    MOED_CHECK(store.ok()) << store.status().message();
    return std::move(store).value();
  }

  const Model model;
  const ExpertStore store;
  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> reader;
};

// Reads leased experts on a stream of the device, as an op would, and compares what it has read with the store.
class Reader {
 public:
  explicit Reader(RingBox& box) : box_(box), stream_(box.device->make_stream()), event_(box.device->make_event()) {}

  Stream& stream() { return *stream_; }
  // Enqueues the read of an expert that the ring has submitted.
  void read(ExpertRing& ring, const Lease& lease) {
    ring.order(lease, *stream_);
    if (num_read_ == reads_.size()) {
      reads_.push_back({.copy = box_.device->allocate(box_.store.shape().bytes(), Memory::kPinned).value(), .id = {}});
    }
    Read& read = reads_[num_read_++];
    read.id = lease.id();
    stream_->copy(read.copy.data(), lease.view().data, box_.store.shape().bytes());
  }
  // Waits for all that was enqueued; the first expert whose bytes were wrong, as text, else "".
  std::string check() {
    stream_->record(*event_);
    MOED_CHECK(event_->join().ok());
    std::string wrong;
    for (size_t i = 0; i < num_read_; ++i) {
      const Read& read = reads_[i];
      const auto bytes = static_cast<size_t>(box_.store.shape().bytes());
      box_.device->host_access(read.copy.data(), box_.store.shape().bytes(), Access::kRead);
      if (wrong.empty() && std::memcmp(read.copy.data(), box_.store.blob(read.id).data, bytes) != 0) {
        wrong = "layer " + std::to_string(read.id.layer) + ", expert " + std::to_string(read.id.expert);
      }
    }
    num_read_ = 0;
    return wrong;
  }

 private:
  struct Read {
    Buffer copy;
    ExpertId id;
  };
  RingBox& box_;
  std::vector<Read> reads_;
  size_t num_read_ = 0;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Event> event_;
};

}  // namespace moed
