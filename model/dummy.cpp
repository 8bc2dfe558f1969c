#include <algorithm>
#include <cmath>
#include <future>
#include <map>
#include <type_traits>
#include <vector>

#include <fmt/format.h>

#include "base/thread_pool.h"
#include "model/required_tensors.h"

namespace moed {
namespace {

// Elements that one thread fills at least.
constexpr int64_t kPartMin = int64_t{1} << 18;

// SplitMix64's finaliser: a counter in, a random word out, so that any part of any tensor can be made alone.
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

uint64_t name_hash(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  return mixed(hash);
}

class DummySource : public TensorSource {
 public:
  DummySource(const Model& model, uint64_t seed)
      : seed_(mixed(seed + 0x9e3779b97f4a7c15ULL)),
        num_layers_(model.config.num_layers),
        tied_(model.config.tied_embeddings) {
    for (RequiredTensor& tensor : required_tensors(model)) {
      std::string name = tensor.name;
      tensors_.emplace(std::move(name), std::move(tensor));
    }
  }

  const std::vector<int64_t>* shape(std::string_view name) const override {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second.shape;
  }
  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : tensors_) names.push_back(name);
    return names;
  }
  Status read(std::string_view name, std::span<Bf16> out) const override { return fill(name, out); }
  Status read(std::string_view name, std::span<float> out) const override { return fill(name, out); }
  bool rounds() const override { return false; }

 private:
  // Standard deviations under which a normed input gives outputs near 1, and the residual stream, which adds two
  // outputs a layer, stays near 1 too.
  double deviation(const RequiredTensor& tensor) const {
    const double in = static_cast<double>(tensor.shape.back());
    switch (tensor.use) {
      case TensorUse::kEmbedding:
        return tied_ ? 1.0 / std::sqrt(in) : 1.0;
      case TensorUse::kNorm:
      case TensorUse::kBias:
        return 0.1;
      case TensorUse::kResidualMatrix:
        return 1.0 / std::sqrt(in * 2.0 * num_layers_);
      case TensorUse::kHead:
      case TensorUse::kMatrix:
        break;
    }
    return 1.0 / std::sqrt(in);
  }

  // Uniform with that deviation, around 1 for norms, rounded to bf16 even for fp32 readers: all see one model. A word
  // makes four numbers of 16 bits.
  template <class T>
  Status fill(std::string_view name, std::span<T> out) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return invalid_argument(fmt::format("tensor {} is missing", name));
    int64_t elements = 1;
    for (const int64_t size : found->second.shape) elements *= size;
    MOED_CHECK(elements == static_cast<int64_t>(out.size())) << name;
    const float step = static_cast<float>(deviation(found->second) * std::sqrt(3.0) / 32768.0);
    const float mean = found->second.use == TensorUse::kNorm ? 1.0F : 0.0F;
    const uint64_t base = seed_ ^ name_hash(name);
    const auto fill_range = [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += 4) {
        uint64_t word = mixed(base + static_cast<uint64_t>(i / 4 + 1) * 0x9e3779b97f4a7c15ULL);
        for (int64_t j = i; j < std::min(i + 4, end); ++j, word >>= 16) {
          const float value = static_cast<float>(static_cast<int32_t>(word & 0xffffU) - 32768) + 0.5F;
          const Bf16 rounded(mean + step * value);
          if constexpr (std::is_same_v<T, float>) {
            out[j] = static_cast<float>(rounded);
          } else {
            out[j] = rounded;
          }
        }
      }
    };
    // A large model is as much as a minute of one thread; a part is worth starting one.
    const int64_t num_parts = std::clamp<int64_t>(elements / kPartMin, 1, default_compute_threads());
    const int64_t part = (elements / num_parts + 3) / 4 * 4;
    std::vector<std::future<void>> others;
    for (int64_t begin = part; begin < elements; begin += part) {
      others.push_back(std::async(std::launch::async, fill_range, begin, std::min(begin + part, elements)));
    }
    fill_range(0, std::min(part, elements));
    for (std::future<void>& other : others) other.get();
    return Status();
  }

  uint64_t seed_;
  int32_t num_layers_;
  bool tied_;
  std::map<std::string, RequiredTensor, std::less<>> tensors_;
};

class HollowSource : public DummySource {
 public:
  explicit HollowSource(const Model& model) : DummySource(model, 0) {}
  bool hollow() const override { return true; }
};

}  // namespace

std::unique_ptr<TensorSource> hollow_weights(const Model& model) { return std::make_unique<HollowSource>(model); }

std::unique_ptr<TensorSource> dummy_weights(const Model& model, uint64_t seed) {
  return std::make_unique<DummySource>(model, seed);
}

}  // namespace moed
