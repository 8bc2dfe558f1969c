#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

// What the kernels take from the machine beyond the language: this side for nvcc. The host side, by which g++ runs the
// same sources, is tests/kernels/cuda_shim/cuda_port.cuh; the include path chooses.

// Shared memory of a block: static, at most 48 KiB in all; and dynamic, sized by the launch, 16-byte aligned.
#define MOED_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define MOED_DYNAMIC_SHARED(type, name)         \
  extern __shared__ uint4 dynamic_shared_all[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared_all)

namespace moed::cuda {

constexpr unsigned kWarp = 0xffffffffU;

// ---- memory. Addresses are multiples of the bytes taken.

__device__ inline uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ inline uint32_t load_4(const void* from) { return *static_cast<const uint32_t*>(from); }
// Of what is read once: leaves the first-level cache to others.
__device__ inline uint4 load_16_streamed(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
__device__ inline void store_16(void* to, uint4 v) { *static_cast<uint4*>(to) = v; }

// Copies 16 bytes of global to shared memory behind the thread's back: the first `bytes` (0 or 16) of them, then zeros.
__device__ inline void copy_async_16(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// Ends a group of the thread's copies.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of the thread's groups but the last kGroups.
template <int kGroups>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- bf16, as bits

__device__ inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ inline uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// ---- tensor cores: one warp, all its lanes

// d += a b. a: 16 x 16, b: 16 x 8, bf16; d: 16 x 8. Fragments as PTX lays them out: with g = lane / 4 and q = lane % 4,
// a[i] is row g + i % 2 * 8, columns q * 2 + i / 2 * 8 and the next; b[i] is rows q * 2 + i * 8 and the next, column g;
// d[i] is row g + i / 2 * 8, column q * 2 + i % 2. The lower half of a word is the first of its two elements.
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane i says where row i % 8 of matrix i / 8 begins
// (16-byte aligned); a lane gets of matrix i, in r[i], row lane / 4, columns lane % 4 * 2 and the next.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
// The same, each matrix transposed.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// ---- launches

// A kernel is loaded when something first asks for it.
template <class... P>
void load_kernel(void (*kernel)(P...)) {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, kernel);
}

// Enqueues a kernel; an empty grid is no launch. What goes wrong is the runtime's last error.
template <class... P, class... A>
void run_kernel(void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared_bytes, void* stream, const A&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int64_t kSharedUnasked = int64_t{48} << 10;
  if (shared_bytes > kSharedUnasked) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(args...);
}

}  // namespace moed::cuda
