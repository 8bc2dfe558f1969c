#pragma once

#include <immintrin.h>

#include <cstdint>

#include "base/bf16.h"
#include "kernels/host/kernel_table.h"

namespace moed {

// What both AVX-512 files share. Tag is a type of the including file alone: kernels_inl.h says why.
template <class Tag>
struct Avx512Vectors {
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 6;
  static constexpr int tile_columns(int rows) { return rows <= 3 ? 8 : 4; }
  static constexpr int kScoreRows = 4;
  static constexpr int kScoreVectors = 4;

  static __mmask16 first(int32_t count) {
    return count >= kLanes ? __mmask16{0xffff} : static_cast<__mmask16>((1U << count) - 1U);
  }
  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const float* p, int32_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(float* p, F x, int32_t count) { _mm512_mask_storeu_ps(p, first(count), x); }
  static F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static F load_bf16(const Bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load_bf16(const Bf16* p, int32_t count) { return widen(_mm256_maskz_loadu_epi16(first(count), p)); }
  // As Bf16(float): to nearest, ties to even, NaN stays NaN.
  static void store_bf16(Bf16* p, F x, int32_t count) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i bits = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power_of_two(F n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static F zero_below(F value, F x, F limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), value);
  }
  static float max_lane(F x) { return _mm512_reduce_max_ps(x); }
  static void prefetch(const Bf16* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

  // Halves of a and b added: 8 lanes of a, 8 of b.
  static F fold2(F a, F b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); }
  // 4 lanes each of a, b, c, d, one 128-bit part each.
  static F fold4(F a, F b, F c, F d) {
    const F ab = fold2(a, b);
    const F cd = fold2(c, d);
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  }
  // Parts of 4 lanes to parts of 2 + 2.
  static F fold_parts(F a, F b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); }
  static F fold_pairs(F a, F b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)); }
  static float sum(F x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // out[i] = sum(x[i]), bit for bit.
  template <int N>
  static void sums(const F* x, float* out) {
    if constexpr (N >= 16) {
      // Part p of quad q holds sum 4p + q of its four: take the vectors so that lane order becomes index order.
      const F q0 = fold4(x[0], x[4], x[8], x[12]);
      const F q1 = fold4(x[1], x[5], x[9], x[13]);
      const F q2 = fold4(x[2], x[6], x[10], x[14]);
      const F q3 = fold4(x[3], x[7], x[11], x[15]);
      _mm512_storeu_ps(out, fold_pairs(fold_parts(q0, q1), fold_parts(q2, q3)));
      sums<N - 16>(x + 16, out + 16);
    } else if constexpr (N >= 8) {
      const F q0 = fold4(x[0], x[4], x[2], x[6]);
      const F q1 = fold4(x[1], x[5], x[3], x[7]);
      const F pairs = fold_parts(q0, q1);
      const F all = fold_pairs(pairs, _mm512_shuffle_f32x4(pairs, pairs, 0xee));
      _mm256_storeu_ps(out, _mm512_castps512_ps256(all));
      sums<N - 8>(x + 8, out + 8);
    } else if constexpr (N > 0) {
      out[0] = sum(x[0]);
      sums<N - 1>(x + 1, out + 1);
    }
  }

  // 16 rows of head_dim bf16 to columns: out[d / 2][row], kChunkPositions words apart.
  static void transpose_words(const Bf16* rows, int32_t head_dim, uint32_t* out) {
    const int32_t words = head_dim / 2;
    for (int32_t word = 0; word < words; word += 16) {
      const int32_t count = words - word;
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        r[i] = _mm512_maskz_loadu_epi32(first(count), reinterpret_cast<const int32_t*>(rows + i * head_dim) + word);
      }
      transpose(r);
      for (int i = 0; i < 16 && i < count; ++i) _mm512_storeu_si512(out + int64_t{word + i} * kChunkPositions, r[i]);
    }
  }

 private:
  static void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4a + j]: words j, j + 4, j + 8, j + 12 of rows 4a..4a + 3, a 128-bit part each.
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
      t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
      t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
      t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
      r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
      r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
      r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
      r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
    }
  }
};

}  // namespace moed
