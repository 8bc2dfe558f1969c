#include "kernels/host/isa.h"
#include "kernels/host/kernel_table.h"

#include "kernels/host/kernels_inl.h"

namespace moed {
namespace {

// Four lanes in the compiler's own vectors: SSE2, NEON or whatever the target has.
struct Vectors {
  using F = float __attribute__((vector_size(16)));
  using I = int32_t __attribute__((vector_size(16)));
  using U = uint32_t __attribute__((vector_size(16)));
  // Even and odd neighbours apart, as fp32.
  struct P {
    F even;
    F odd;
  };
  static constexpr int kLanes = 4;
  static constexpr int kTileRows = 2;
  static constexpr int tile_columns(int rows) { return rows == 1 ? 4 : 2; }
  static constexpr int kScoreRows = 2;
  static constexpr int kScoreVectors = 2;

  static F zero() { return F{0, 0, 0, 0}; }
  static F set1(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  static F load(const float* p, int32_t count) {
    if (count >= kLanes) return load(p);
    F x = zero();
    for (int i = 0; i < count; ++i) x[i] = p[i];
    return x;
  }
  static void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static void store(float* p, F x, int32_t count) {
    if (count >= kLanes) return store(p, x);
    for (int i = 0; i < count; ++i) p[i] = x[i];
  }
  static F load_bf16(const Bf16* p) { return reinterpret_cast<F>(U{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16); }
  static F load_bf16(const Bf16* p, int32_t count) {
    if (count >= kLanes) return load_bf16(p);
    U u = {0, 0, 0, 0};
    for (int i = 0; i < count; ++i) u[i] = p[i].bits;
    return reinterpret_cast<F>(u << 16);
  }
  // As Bf16(float): to nearest, ties to even, NaN stays NaN.
  static void store_bf16(Bf16* p, F x, int32_t count) {
    const U u = reinterpret_cast<U>(x);
    const U rounded = (u + 0x7fffU + ((u >> 16) & 1U)) >> 16;
    const U nan = reinterpret_cast<U>(x != x);
    const U bits = (nan & ((u >> 16) | 0x40U)) | (~nan & rounded);
    for (int i = 0; i < kLanes && i < count; ++i) p[i].bits = static_cast<uint16_t>(bits[i]);
  }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  // Right below 2^22, which is all that exp() asks for: the addend pushes the fraction out of the mantissa.
  static F round(F x) { return (x + 12582912.0F) - 12582912.0F; }
  static F power_of_two(F n) { return reinterpret_cast<F>((__builtin_convertvector(n, I) + 127) << 23); }
  static F zero_below(F value, F x, F limit) {
    return reinterpret_cast<F>(reinterpret_cast<I>(value) & ~reinterpret_cast<I>(x < limit));
  }
  static float max_lane(F x) {
    const float a = x[0] > x[2] ? x[0] : x[2];
    const float b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
  }
  static void prefetch(const Bf16*) {}
  static float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  template <int N>
  static void sums(const F* x, float* out) {
    for (int i = 0; i < N; ++i) out[i] = sum(x[i]);
  }
  static P split(U words) { return {reinterpret_cast<F>(words << 16), reinterpret_cast<F>(words & 0xffff0000U)}; }
  // Words whose low half is the neighbour that comes first, whatever the byte order.
  static U words(const Bf16* p) {
    const auto word = [p](int i) {
      return static_cast<uint32_t>(p[i].bits) | static_cast<uint32_t>(p[i + 1].bits) << 16;
    };
    return U{word(0), word(2), word(4), word(6)};
  }
  static P load_pairs(const Bf16* p) { return split(words(p)); }
  static P load_pairs(const Bf16* p, int32_t count) {
    Bf16 some[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) some[i].bits = i < count ? p[i].bits : uint16_t{0};
    return load_pairs(some);
  }
  static P load_words(const uint32_t* p) {
    U u;
    __builtin_memcpy(&u, p, sizeof(u));
    return split(u);
  }
  static P broadcast_pair(const Bf16* p) {
    const uint32_t word = static_cast<uint32_t>(p[0].bits) | static_cast<uint32_t>(p[1].bits) << 16;
    return split(U{word, word, word, word});
  }
  static F dot(F acc, const P& a, const P& b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }

  // 16 rows of head_dim bf16 to columns: out[d / 2][row], kChunkPositions words apart.
  static void transpose_words(const Bf16* rows, int32_t head_dim, uint32_t* out) {
    for (int32_t row = 0; row < 16; ++row) {
      const Bf16* p = rows + row * head_dim;
      for (int32_t word = 0; word < head_dim / 2; ++word, p += 2) {
        out[int64_t{word} * kChunkPositions + row] = static_cast<uint32_t>(p[0].bits) | static_cast<uint32_t>(p[1].bits)
                                                                                            << 16;
      }
    }
  }
};

}  // namespace

const KernelTable& portable_kernels() { return Kernels<Vectors>::table(); }

}  // namespace moed
