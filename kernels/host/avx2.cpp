#include <immintrin.h>

#include "kernels/host/isa.h"
#include "kernels/host/kernel_table.h"

#include "kernels/host/kernels_inl.h"

namespace moed {
namespace {

struct Vectors {
  using F = __m256;
  // Even and odd neighbours apart, as fp32.
  struct P {
    F even;
    F odd;
  };
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 3;
  static constexpr int tile_columns(int rows) { return rows <= 2 ? 4 : 2; }
  static constexpr int kScoreRows = 4;
  static constexpr int kScoreVectors = 2;

  static __m256i first(int32_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const float* p, int32_t count) {
    return count >= kLanes ? load(p) : _mm256_maskload_ps(p, first(count));
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(float* p, F x, int32_t count) {
    if (count >= kLanes) return store(p, x);
    _mm256_maskstore_ps(p, first(count), x);
  }
  static F widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static F load_bf16(const Bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_bf16(const Bf16* p, int32_t count) {
    if (count >= kLanes) return load_bf16(p);
    uint16_t some[kLanes] = {};
    __builtin_memcpy(some, p, count * sizeof(Bf16));
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(some)));
  }
  // As Bf16(float): to nearest, ties to even, NaN stays NaN.
  static void store_bf16(Bf16* p, F x, int32_t count) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i bits = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    if (count >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    __builtin_memcpy(static_cast<void*>(p), &packed, count * sizeof(Bf16));
  }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power_of_two(F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static F zero_below(F value, F x, F limit) { return _mm256_and_ps(value, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ)); }
  static float max_lane(F x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  static void prefetch(const Bf16* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static float sum(F x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  template <int N>
  static void sums(const F* x, float* out) {
    for (int i = 0; i < N; ++i) out[i] = sum(x[i]);
  }
  static P split(__m256i words) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000U))))};
  }
  static P load_pairs(const Bf16* p) { return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static P load_pairs(const Bf16* p, int32_t count) {
    uint16_t some[2 * kLanes] = {};
    __builtin_memcpy(some, p, count * sizeof(Bf16));
    return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(some)));
  }
  static P load_words(const uint32_t* p) { return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static P broadcast_pair(const Bf16* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return split(_mm256_set1_epi32(word));
  }
  static F dot(F acc, const P& a, const P& b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }

  // 16 rows of head_dim bf16 to columns: out[d / 2][row], kChunkPositions words apart.
  static void transpose_words(const Bf16* rows, int32_t head_dim, uint32_t* out) {
    for (int32_t row = 0; row < 16; ++row) {
      for (int32_t word = 0; word < head_dim / 2; ++word) {
        __builtin_memcpy(out + int64_t{word} * kChunkPositions + row, rows + row * head_dim + 2 * word, 4);
      }
    }
  }
};

}  // namespace

const KernelTable& avx2_kernels() { return Kernels<Vectors>::table(); }

}  // namespace moed
