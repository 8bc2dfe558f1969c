#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/bf16.h"
#include "tests/kernels/cuda_shim/cuda_on_host.h"

// The host side of kernels/cuda/nvcc/cuda_port.cuh, and as much of CUDA's language as the kernels speak.

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define threadIdx (::moed::cuda_on_host::lane().thread)
#define blockIdx (::moed::cuda_on_host::block().index)
#define blockDim (::moed::cuda_on_host::block().threads)
#define gridDim (::moed::cuda_on_host::block().blocks)

#define MOED_SHARED(type, name, count)        \
  static constexpr char name##_key = 0;       \
  type* const name = reinterpret_cast<type*>( \
      ::moed::cuda_on_host::shared_array(&name##_key, static_cast<int64_t>(sizeof(type)) * (count)))
#define MOED_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::moed::cuda_on_host::dynamic_shared())

struct uint4 {
  uint32_t x, y, z, w;
};
using dim3 = ::moed::cuda_on_host::Extent;
using std::source_location;

inline void __syncthreads(const source_location& at = source_location::current()) {
  ::moed::cuda_on_host::meet_block(at);
}
inline void __syncwarp(unsigned = ~0U, const source_location& at = source_location::current()) {
  ::moed::cuda_on_host::meet_warp(at);
}
template <class T>
T moed_exchange(T value, unsigned from, const source_location& at) {
  ::moed::cuda_on_host::show(&value, sizeof value, at);
  std::memcpy(&value, ::moed::cuda_on_host::peek(from), sizeof value);
  return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int from, const source_location& at = source_location::current()) {
  return moed_exchange(value, static_cast<unsigned>(from) % 32, at);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, const source_location& at = source_location::current()) {
  return moed_exchange(value, ::moed::cuda_on_host::lane().in_warp ^ static_cast<unsigned>(mask), at);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta, const source_location& at = source_location::current()) {
  const unsigned me = ::moed::cuda_on_host::lane().in_warp;
  return moed_exchange(value, me < delta ? me : me - delta, at);
}
inline unsigned __ballot_sync(unsigned, bool vote, const source_location& at = source_location::current()) {
  ::moed::cuda_on_host::show(&vote, sizeof vote, at);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) votes |= static_cast<unsigned>(*::moed::cuda_on_host::peek(i)) << i;
  return votes;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
// Lanes take turns only where they meet.
inline unsigned atomicAdd(unsigned* to, unsigned x) {
  const unsigned before = *to;
  *to += x;
  return before;
}

namespace moed::cuda {

constexpr unsigned kWarp = 0xffffffffU;

template <class T>
T load_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
T load_aligned(const void* from) {
  cuda_on_host::check_aligned(from, sizeof(T), "what a wide load reads");
  return load_as<T>(from);
}
inline uint4 load_16(const void* from) { return load_aligned<uint4>(from); }
inline uint4 load_16_streamed(const void* from) { return load_aligned<uint4>(from); }
inline uint32_t load_4(const void* from) { return load_aligned<uint32_t>(from); }
inline void store_16(void* to, uint4 v) {
  cuda_on_host::check_aligned(to, sizeof v, "what a wide store writes");
  std::memcpy(to, &v, sizeof v);
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
  cuda_on_host::copy_async(shared, global, bytes);
}
inline void copy_async_commit() { cuda_on_host::commit_copies(); }
template <int kGroups>
void copy_async_wait(const source_location& at = source_location::current()) {
  cuda_on_host::wait_for_copies(kGroups, at);
}

inline float from_bf16(uint16_t bits) {
  Bf16 x;
  x.bits = bits;
  return static_cast<float>(x);
}
inline uint16_t to_bf16(float x) { return Bf16(x).bits; }

// What every lane shows of its part of a product.
struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
};

inline void split_word(uint32_t word, float* to) {
  to[0] = from_bf16(static_cast<uint16_t>(word & 0xFFFFU));
  to[1] = from_bf16(static_cast<uint16_t>(word >> 16));
}

// As tensor cores end a sum of products.
inline float toward_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::abs(double{nearest}) > std::abs(x) ? std::nextafter(nearest, 0.0F) : nearest;
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const source_location& at = source_location::current()) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  cuda_on_host::show(&mine, sizeof mine, at);
  const unsigned me = cuda_on_host::lane().in_warp;
  float rows[2][16];     // of a: lane / 4 and that + 8
  float columns[2][16];  // of b: lane % 4 * 2 and the next
  for (unsigned q = 0; q < 4; ++q) {
    const auto of_row = load_as<Fragments>(cuda_on_host::peek(me / 4 * 4 + q));
    for (unsigned i = 0; i < 4; ++i) split_word(of_row.a[i], rows[i % 2] + q * 2 + i / 2 * 8);
    for (unsigned column = 0; column < 2; ++column) {
      const auto of_column = load_as<Fragments>(cuda_on_host::peek((me % 4 * 2 + column) * 4 + q));
      for (unsigned i = 0; i < 2; ++i) split_word(of_column.b[i], columns[column] + q * 2 + i * 8);
    }
  }
  for (unsigned begin = 0; begin < 16; begin += 8) {
    for (unsigned i = 0; i < 4; ++i) {
      double sum = d[i];
      for (unsigned k = begin; k < begin + 8; ++k) sum += double{rows[i / 2][k]} * double{columns[i % 2][k]};
      d[i] = toward_zero(sum);
    }
  }
}

inline void load_matrices_at(uint32_t (&r)[4], const void* shared_row, bool transposed, const source_location& at) {
  cuda_on_host::check_aligned(shared_row, 16, "a row of a matrix in shared memory");
  cuda_on_host::show(&shared_row, sizeof shared_row, at);
  const unsigned me = cuda_on_host::lane().in_warp;
  for (unsigned i = 0; i < 4; ++i) {
    r[i] = 0;
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned row = transposed ? me % 4 * 2 + half : me / 4;
      const unsigned column = transposed ? me / 4 : me % 4 * 2 + half;
      const auto* begin = load_as<const std::byte*>(cuda_on_host::peek(i * 8 + row));
      r[i] |= static_cast<uint32_t>(load_as<uint16_t>(begin + 2 * column)) << (16 * half);
    }
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* shared_row,
                          const source_location& at = source_location::current()) {
  load_matrices_at(r, shared_row, false, at);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row,
                                     const source_location& at = source_location::current()) {
  load_matrices_at(r, shared_row, true, at);
}

template <class... P>
void load_kernel(void (*kernel)(P...)) {
  cuda_on_host::note_loaded(reinterpret_cast<const void*>(kernel));
}

template <class... P, class... A>
void run_kernel(void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared_bytes, void* /*stream*/, const A&... args) {
  cuda_on_host::check_loaded(reinterpret_cast<const void*>(kernel));
  cuda_on_host::run_grid({grid, block, shared_bytes}, [&] { kernel(args...); });
}

}  // namespace moed::cuda
