#include "base/check.h"
#include "cuda_port.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduce.cuh"

namespace moed::cuda {
namespace {

constexpr int kSampleThreads = 1024;
constexpr int kSampleWarps = kSampleThreads / kWarpSize;
// Logits that a thread asks for before it looks at the first.
constexpr int kLoads = 8;
// Weights lie in [0, 1]. Counted in units of 2^-43 their sums are whole numbers, which no order of adding changes and
// no vocabulary of up to 2^20 overflows.
constexpr float kWeightUnits = 8796093022208.0F;
constexpr int32_t kVocabMax = 1 << 20;
// Digits of a rank, the first first: 11, 11 and 10 bits.
constexpr int kDigits = 3;
constexpr int kBins = 2048;

// Larger logits have larger numbers, zeros of both signs the same; NaNs lie above infinity.
__device__ inline uint32_t ordered(float x) {
  if (x != x) return ~0U;
  const uint32_t bits = __float_as_uint(x == 0.0F ? 0.0F : x);
  return (bits >> 31) != 0U ? ~bits : bits | 0x80000000U;
}
// The best logits have the lowest ranks.
__device__ inline uint32_t rank_of(float x) { return ~ordered(x); }
__device__ inline float logit_of(uint32_t rank) {
  const uint32_t order = ~rank;
  return __uint_as_float((order >> 31) != 0U ? order & 0x7fffffffU : ~order);
}

// A row, and what a token of it weighs.
struct Row {
  const float* logits;
  int32_t vocab;
  float peak;
  float inverse_temperature;
  float weight_min;

  __device__ uint64_t weight(float x) const {
    const float weight = expf((x - peak) * inverse_temperature);
    return weight >= weight_min ? static_cast<uint64_t>(weight * kWeightUnits) : 0;
  }
};

// Sums by rank, 64 bits in two words: what a block adds to in shared memory is 32 bits wide everywhere.
struct Bins {
  unsigned* words;  // [2 * kBins]

  __device__ void add(int bin, uint64_t x) const {
    const auto low = static_cast<unsigned>(x);
    unsigned high = static_cast<unsigned>(x >> 32);
    if (low != 0 && atomicAdd(words + bin, low) + low < low) ++high;
    if (high != 0) atomicAdd(words + kBins + bin, high);
  }
  __device__ uint64_t sum(int bin) const { return static_cast<uint64_t>(words[kBins + bin]) << 32 | words[bin]; }
};

// fn(token, logit) for each of the row's, by all threads.
template <class Fn>
__device__ inline void for_logits(const Row& row, const Fn& fn) {
  for (int32_t base = static_cast<int32_t>(threadIdx.x); base < row.vocab; base += kSampleThreads * kLoads) {
    float x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t token = base + i * kSampleThreads;
      x[i] = token < row.vocab ? row.logits[token] : 0.0F;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t token = base + i * kSampleThreads;
      if (token < row.vocab) fn(token, x[i]);
    }
  }
}

// Of all threads' x, the same in each. `partials`: [kSampleWarps] of shared memory, free again after the next barrier.
template <class Join>
__device__ inline uint64_t join_block(uint64_t x, uint64_t* partials, const Join& join) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(kWarp, x, distance));
  if (lane_of_thread() == 0) partials[warp_of_thread()] = x;
  __syncthreads();
  x = partials[0];
  for (int warp = 1; warp < kSampleWarps; ++warp) x = join(x, partials[warp]);
  return x;
}

struct Passed {
  int32_t index;
  uint64_t before;  // sum of the measures below it
};

// The first index of [0, n) at which the sum of the measures up to and with its own exceeds target_of(sum of all): by
// ever smaller shares, a warp each. The same in each thread. REQUIRES: it does at some.
template <class Measure, class TargetOf>
__device__ inline Passed find_passed(int32_t n, uint64_t* partials, const Measure& measure, const TargetOf& target_of) {
  const int warp = warp_of_thread();
  const int lane = lane_of_thread();
  int32_t begin = 0;
  int32_t end = n;
  uint64_t before = 0;
  uint64_t target = 0;
  bool is_first = true;
  do {
    const auto share = static_cast<int32_t>(divide_up(end - begin, kSampleThreads) * kWarpSize);
    const int32_t own_end = min(begin + (warp + 1) * share, end);
    uint64_t sum = 0;
#pragma unroll 8
    for (int32_t i = begin + warp * share + lane; i < own_end; i += kWarpSize) sum += measure(i);
    sum = warp_sum(sum);
    __syncthreads();  // the last partials have been read
    if (lane == 0) partials[warp] = sum;
    __syncthreads();
    if (is_first) {
      uint64_t total = 0;
      for (int i = 0; i < kSampleWarps; ++i) total += partials[i];
      target = target_of(total);
      is_first = false;
    }
    int chosen = 0;
    while (chosen + 1 < kSampleWarps && before + partials[chosen] <= target) before += partials[chosen++];
    begin = min(begin + chosen * share, end);
    end = min(begin + share, end);
  } while (end - begin > kWarpSize);

  const uint64_t mine = begin + lane < end ? measure(begin + lane) : 0;
  const uint64_t upto = before + warp_inclusive_sum(mine);
  const unsigned above = __ballot_sync(kWarp, upto > target);
  const int at = above == 0 ? 0 : __ffs(static_cast<int>(above)) - 1;
  return {begin + at, __shfl_sync(kWarp, upto - mine, at)};
}

struct Shared {
  uint64_t* partials;  // [kSampleWarps]
  Bins first;          // weights by the first digit of the rank
  Bins bins;
};

// Adds up the measures of tokens whose rank begins with `prefix`, by the digit at `shift`.
template <class Measure>
__device__ inline void fill(const Row& row, const Bins& bins, uint32_t prefix, int shift, int width,
                            const Measure& measure) {
  __syncthreads();  // the last sums have been read
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kBins; i += kSampleThreads) bins.words[i] = 0;
  __syncthreads();
  for_logits(row, [&](int32_t, float x) {
    const uint32_t rank = rank_of(x);
    const bool is_in = shift + width == 32 || rank >> (shift + width) == prefix;
    if (is_in) bins.add(static_cast<int>(rank >> shift & ((1U << width) - 1U)), measure(x));
  });
  __syncthreads();
}

struct Ranked {
  uint32_t rank;
  uint64_t before;  // sum of the measures of better ranks
  uint64_t target;
};

// The rank at which the sum of the measures, best first, exceeds target_of(sum of all). `first`: sums by the first
// digit that are there already, or where they go.
template <class Measure, class TargetOf>
__device__ inline Ranked find_rank(const Row& row, const Shared& shared, const Bins& first, bool is_filled,
                                   const Measure& measure, const TargetOf& target_of) {
  Ranked found = {0, 0, 0};
  int shift = 32;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int width = digit + 1 < kDigits ? 11 : 10;
    shift -= width;
    const Bins bins = digit == 0 ? first : shared.bins;
    if (digit > 0 || !is_filled) fill(row, bins, found.rank, shift, width, measure);
    const Passed passed = find_passed(
        1 << width, shared.partials, [&](int32_t bin) { return bins.sum(bin); },
        [&](uint64_t total) {
          if (digit == 0) found.target = target_of(total);
          return found.target - found.before;
        });
    found.rank = found.rank << width | static_cast<uint32_t>(passed.index);
    found.before += passed.before;
  }
  return found;
}

// share of `all`, below all.
__device__ inline uint64_t part_of(uint64_t all, double share) {
  const auto part = static_cast<uint64_t>(share * static_cast<double>(all));
  return part < all ? part : all - 1;
}

// Weights of the best `count` tokens. Tokens of a rank weigh the same: which of them count does not matter.
__device__ inline uint64_t weight_of_best(const Row& row, const Shared& shared, int32_t count) {
  const auto one = [](float) { return uint64_t{1}; };
  const auto last = [&](uint64_t) { return static_cast<uint64_t>(count - 1); };
  const Ranked cut = find_rank(row, shared, shared.bins, false, one, last);
  uint64_t above = 0;
  for_logits(row, [&](int32_t, float x) { above += rank_of(x) < cut.rank ? row.weight(x) : 0; });
  __syncthreads();  // the partials have been read
  above = join_block(above, shared.partials, [](uint64_t a, uint64_t b) { return a + b; });
  return above + (static_cast<uint64_t>(count) - cut.before) * row.weight(logit_of(cut.rank));
}

// A draw from what top_k and top_p leave.
__device__ inline int32_t draw_cut(const Row& row, const Shared& shared, const SampleRow& how) {
  const auto weight = [&](float x) { return row.weight(x); };
  const bool few = how.top_k > 0 && how.top_k < row.vocab;
  uint64_t held = few ? weight_of_best(row, shared, how.top_k) : 0;
  bool is_filled = false;
  if (how.top_p < 1.0F) {
    // The least whole number of units that holds the share; the prefix exceeds one less.
    const auto share = [&](uint64_t total) {
      const uint64_t all = few ? held : total;
      const auto wanted = static_cast<uint64_t>(ceil(static_cast<double>(how.top_p) * static_cast<double>(all)));
      return wanted == 0 ? 0 : min(wanted, all) - 1;
    };
    const Ranked cut = find_rank(row, shared, shared.first, false, weight, share);
    const uint64_t each = row.weight(logit_of(cut.rank));
    held = cut.before + ((cut.target - cut.before) / each + 1) * each;
    is_filled = true;
  }
  const Ranked drawn =
      find_rank(row, shared, shared.first, is_filled, weight, [&](uint64_t) { return part_of(held, how.uniform); });
  // Which of the tokens of that rank.
  const uint64_t nth = (drawn.target - drawn.before) / row.weight(logit_of(drawn.rank));
  return find_passed(
             row.vocab, shared.partials,
             [&](int32_t token) { return uint64_t{rank_of(row.logits[token]) == drawn.rank}; },
             [&](uint64_t) { return nth; })
      .index;
}

// A block a row. Every thread knows what it is told.
__global__ void __launch_bounds__(kSampleThreads)
    sample_rows(const SampleRow* rows, Matrix<const float> logits, int32_t* tokens) {
  MOED_SHARED(uint64_t, partials, kSampleWarps);
  MOED_SHARED(unsigned, first, 2 * kBins);
  MOED_SHARED(unsigned, bins, 2 * kBins);
  const SampleRow how = rows[blockIdx.x];
  Row row = {logits.data + blockIdx.x * logits.stride, logits.cols, 0.0F, 1.0F, how.min_p};
  const auto tell = [&](int32_t token) {
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
  };
  // The largest logit, then the lowest id.
  uint64_t best = 0;
  for_logits(row, [&](int32_t token, float x) {
    const uint64_t one = static_cast<uint64_t>(ordered(x)) << 32 | ~static_cast<uint32_t>(token);
    best = best < one ? one : best;
  });
  best = join_block(best, partials, [](uint64_t a, uint64_t b) { return a < b ? b : a; });
  const auto order = static_cast<uint32_t>(best >> 32);
  const bool is_greedy = how.temperature < kTemperatureMin;
  if (order >= ordered(INFINITY) || (order == ordered(-INFINITY) && !is_greedy)) return tell(-1);
  if (is_greedy) return tell(static_cast<int32_t>(~static_cast<uint32_t>(best)));

  row.peak = logit_of(~order);
  row.inverse_temperature = 1.0F / how.temperature;
  if (how.top_p < 1.0F || (how.top_k > 0 && how.top_k < row.vocab)) {
    return tell(draw_cut(row, {partials, {first}, {bins}}, how));
  }
  tell(find_passed(
           row.vocab, partials, [&](int32_t token) { return row.weight(row.logits[token]); },
           [&](uint64_t total) { return part_of(total, how.uniform); })
           .index);
}

}  // namespace

void sample(const Sample& args, const Launch& launch) {
  MOED_CHECK(args.logits.cols <= kVocabMax) << "sample: a vocabulary of " << args.logits.cols;
  run_kernel(sample_rows, dim3{static_cast<unsigned>(args.rows.size())}, dim3{kSampleThreads}, 0, launch.stream,
             args.rows.data(), args.logits, args.tokens);
}

void load_sample_kernels() { load_kernel(sample_rows); }

}  // namespace moed::cuda
