#include "kernels/host/isa.h"
#include "kernels/host/kernel_table.h"

#include "kernels/host/avx512_vectors.h"
#include "kernels/host/kernels_inl.h"

namespace moed {
namespace {

struct Tag {};

struct Vectors : Avx512Vectors<Tag> {
  // Even and odd neighbours apart, as fp32.
  struct P {
    F even;
    F odd;
  };
  static constexpr int kTileRows = 4;
  static constexpr int tile_columns(int rows) { return rows <= 2 ? 8 : 4; }
  static P split(__m512i words) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000U))))};
  }
  static P load_pairs(const Bf16* p) { return split(_mm512_loadu_si512(p)); }
  static P load_pairs(const Bf16* p, int32_t count) {
    return split(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1U), p));
  }
  static P load_words(const uint32_t* p) { return split(_mm512_loadu_si512(p)); }
  static P broadcast_pair(const Bf16* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return split(_mm512_set1_epi32(word));
  }
  static F dot(F acc, const P& a, const P& b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
};

}  // namespace

const KernelTable& avx512_kernels() { return Kernels<Vectors>::table(); }

}  // namespace moed
