#include "offload/prefetcher.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

// A layer's first visits are all scored; later one in so many where the lookahead is not trusted.
constexpr int64_t kFirstScored = 16;
constexpr int64_t kUntrustedEvery = 32;
// Where it is trusted, its rivals are looked at in one visit of so many.
constexpr int64_t kRivalsEvery = 8;
// Of the sums that the lookahead is judged by, at each visit scored.
constexpr float kScoreDecay = 0.95F;
// Of the experts that the lookahead names, so many must be chosen to be worth their copies.
constexpr float kPrecisionMin = 0.5F;
// Passes over the model in which nothing was streamed until popular experts are copied no more.
constexpr int64_t kIdlePasses = 2;

}  // namespace

Prefetcher::Prefetcher(const ExpertIndex& index, const ExpertCache& cache)
    : index_(index),
      cache_(cache),
      layers_(index.num_layers()),
      expected_(index.size()),
      listed_(index.size()),
      visits_streamed_(kIdlePasses * index.num_layers()),
      keys_(index.num_experts()),
      top_(index.num_experts()) {
  const size_t words = num_words(index.num_experts());
  for (auto& trials : trials_) {
    for (Trial& trial : trials) {
      trial.named.resize(words);
      trial.popular.resize(words);
    }
  }
  expecting_.reserve(int64_t{2} * index.num_experts());
  list_.reserve(kListMax);
}

bool Prefetcher::wants_prediction(int32_t moe_layer) const {
  const Layer& layer = layers_[moe_layer];
  return layer.trusted || layer.num_scored < kFirstScored || layer.visits % kUntrustedEvery == 0;
}

void Prefetcher::predicted(int32_t moe_layer, RowsId rows, std::span<const int32_t> counts,
                           std::span<const uint64_t> present) {
  const Layer& layer = layers_[moe_layer];
  Trial& trial = trial_of(rows, moe_layer);
  trial.moe_layer = moe_layer;
  std::fill(trial.named.begin(), trial.named.end(), 0);
  trial.count = 0;
  for (int32_t expert = 0; expert < index_.num_experts(); ++expert) {
    if (counts[expert] == 0 || has_bit(present, expert)) continue;
    set_bit(trial.named, expert);
    keys_[trial.count++] = uint64_t{static_cast<uint32_t>(counts[expert])} << 32 | static_cast<uint32_t>(expert);
  }
  if (layer.trusted) expect(moe_layer, trial.count);
  trial.rivals = !layer.trusted || layer.visits % kRivalsEvery == 0;
  if (trial.rivals && trial.count > 0) {
    top_.choose(cache_.scores(moe_layer), present, present, trial.count, trial.popular);
  }
}

void Prefetcher::expect(int32_t moe_layer, int32_t count) {
  if (std::exchange(expecting_layer_, moe_layer) != moe_layer) {
    expecting_.clear();
    expecting_next_ = 0;
    ++expected_number_;
  }
  std::sort(keys_.begin(), keys_.begin() + count, std::greater<>());
  for (int32_t i = 0; i < count && expecting_.size() < expecting_.capacity(); ++i) {
    expecting_.push_back(moe_layer * index_.num_experts() + static_cast<int32_t>(keys_[i] & 0xffffffff));
    expected_[expecting_.back()] = expected_number_;
  }
}

void Prefetcher::routed(int32_t moe_layer, RowsId rows, std::span<const int32_t> counts) {
  Layer& layer = layers_[moe_layer];
  ++layer.visits;
  ++visits_streamed_;
  popular_layer_ = (moe_layer + 1) % index_.num_layers();
  popular_left_ = visits_streamed_ <= kIdlePasses * index_.num_layers() ? index_.num_layers() : 0;
  if (expecting_layer_ == moe_layer) expecting_layer_ = -1;
  Trial& trial = trial_of(rows, moe_layer);
  if (std::exchange(trial.moe_layer, -1) == moe_layer) score(layer, trial, counts);
}

void Prefetcher::score(Layer& layer, const Trial& trial, std::span<const int32_t> counts) {
  if (trial.count == 0) return;
  ++layer.num_scored;
  layer.lookahead.count(trial.count, trial.named, counts);
  if (trial.rivals) layer.popularity.count(trial.count, trial.popular, counts);
  const float share = layer.lookahead.share();
  layer.trusted = layer.num_scored >= kFirstScored && share > layer.popularity.share() && share >= kPrecisionMin;
}

void Prefetcher::Tally::count(int32_t num_named, const ExpertBits& bits, std::span<const int32_t> counts) {
  int32_t num_chosen = 0;
  for (size_t word = 0; word < bits.size(); ++word) {
    for (uint64_t left = bits[word]; left != 0; left &= left - 1) {
      num_chosen += counts[word * 64 + static_cast<size_t>(std::countr_zero(left))] > 0 ? 1 : 0;
    }
  }
  named = named * kScoreDecay + static_cast<float>(num_named);
  chosen = chosen * kScoreDecay + static_cast<float>(num_chosen);
}

void Prefetcher::list(std::span<const ExpertId> wanted) {
  list_.clear();
  list_next_ = 0;
  ++list_number_;
  for (const ExpertId id : wanted.first(std::min(wanted.size(), kListMax))) {
    MOED_CHECK(index_.has(id)) << "prefetch: layer " << id.layer << ", expert " << id.expert;
    list_.push_back(index_.of(id));
    listed_[list_.back()] = list_number_;
  }
}

int32_t Prefetcher::next(FunctionRef<bool(int32_t expert)> absent) {
  for (; expecting_layer_ >= 0 && expecting_next_ < expecting_.size(); ++expecting_next_) {
    if (absent(expecting_[expecting_next_])) return expecting_[expecting_next_];
  }
  for (; list_next_ < list_.size(); ++list_next_) {
    if (absent(list_[list_next_])) return list_[list_next_];
  }
  return next_popular(absent);
}

int32_t Prefetcher::next_popular(FunctionRef<bool(int32_t expert)> absent) {
  for (; popular_left_ > 0; --popular_left_) {
    const int32_t first = popular_layer_ * index_.num_experts();
    Layer& layer = layers_[popular_layer_];
    const int64_t changes = cache_.num_changes(popular_layer_);
    for (size_t word = 0; layer.changes_seen != changes && word < num_words(index_.num_experts()); ++word) {
      for (uint64_t bits = cache_.missing(popular_layer_, word); bits != 0; bits &= bits - 1) {
        const int32_t expert = static_cast<int32_t>(word) * 64 + std::countr_zero(bits);
        if (absent(first + expert) && cache_.gains(popular_layer_, expert)) return first + expert;
      }
    }
    layer.changes_seen = changes;
    popular_layer_ = popular_layer_ + 1 == index_.num_layers() ? 0 : popular_layer_ + 1;
  }
  return -1;
}

}  // namespace moed
