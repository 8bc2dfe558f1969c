#include "kernels/host/isa.h"
#include "kernels/host/kernel_table.h"

#include "kernels/host/avx512_vectors.h"
#include "kernels/host/kernels_inl.h"

namespace moed {
namespace {

struct Tag {};

struct Vectors : Avx512Vectors<Tag> {
  using P = __m512bh;
  static P load_pairs(const Bf16* p) { return reinterpret_cast<P>(_mm512_loadu_si512(p)); }
  static P load_pairs(const Bf16* p, int32_t count) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1U);
    return reinterpret_cast<P>(_mm512_maskz_loadu_epi16(mask, p));
  }
  static P load_words(const uint32_t* p) { return reinterpret_cast<P>(_mm512_loadu_si512(p)); }
  static P broadcast_pair(const Bf16* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return reinterpret_cast<P>(_mm512_set1_epi32(word));
  }
  static F dot(F acc, P a, P b) { return _mm512_dpbf16_ps(acc, a, b); }
};

}  // namespace

const KernelTable& avx512_bf16_kernels() { return Kernels<Vectors>::table(); }

}  // namespace moed
