#include "tests/kernels/cuda_shim/probes.h"

#include "cuda_port.cuh"

namespace moed::probes {
namespace {

using cuda::kWarp;

__global__ void note_order(int* order, int* next) { order[(*next)++] = static_cast<int>(threadIdx.x); }

__global__ void read_unwritten(uint32_t* out, int count) {
  MOED_DYNAMIC_SHARED(uint32_t, shared);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) out[i] = shared[i];
}

__global__ void read_neighbour(int* out, bool barrier) {
  MOED_SHARED(int, numbers, 1024);
  const auto me = static_cast<int>(threadIdx.x);
  numbers[me] = me;
  if (barrier) __syncthreads();
  out[me] = numbers[(me + 1) % static_cast<int>(blockDim.x)];
}

__global__ void copy_and_look(const uint32_t* from, CopySeen* seen) {
  MOED_SHARED(uint32_t, shared, 4);
  cuda::copy_async_16(shared, from, 16);
  cuda::copy_async_commit();
  seen->before = shared[3];
  cuda::copy_async_wait<0>();
  seen->after = shared[3];
}

uint32_t pair(const uint16_t* from, int step) { return from[0] | static_cast<uint32_t>(from[step]) << 16; }

__global__ void multiply_fragments(const uint16_t* a, const uint16_t* b, float* d, bool by_matrices) {
  MOED_SHARED(uint16_t, a_rows, 16 * 16);
  MOED_SHARED(uint16_t, b_rows, 16 * 8);
  const auto lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) a_rows[i] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) b_rows[i] = b[i];
  __syncthreads();
  const int g = lane / 4;
  const int q = lane % 4;
  uint32_t as[4];
  uint32_t bs[4];
  if (by_matrices) {
    cuda::load_matrices(as, a_rows + lane % 16 * 16 + lane / 16 * 8);
    cuda::load_matrices_transposed(bs, b_rows + lane % 16 * 8);
  } else {
    for (int i = 0; i < 4; ++i) as[i] = pair(a + (g + i % 2 * 8) * 16 + q * 2 + i / 2 * 8, 1);
    for (int i = 0; i < 2; ++i) bs[i] = pair(b + (q * 2 + i * 8) * 8 + g, 8);
  }
  float sums[4] = {};
  cuda::mma_m16n8k16(sums, as, {bs[0], bs[1]});
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + q * 2 + i % 2] = sums[i];
}

__global__ void shuffle_in_half() {
  if (threadIdx.x < 16) __shfl_xor_sync(kWarp, 1, 1);
}

__global__ void meet_apart() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void leave_early() {
  if (threadIdx.x < 32) return;
  __syncwarp();
  if (threadIdx.x < 48) __syncwarp();
}

__global__ void take_shared() {
  MOED_SHARED(char, much, 50 << 10);
  much[0] = 0;
}

__global__ void write_shared(int at) {
  MOED_SHARED(int, numbers, 32);
  numbers[at + static_cast<int>(threadIdx.x)] = 0;
}

__global__ void read_global(const int* from, int* to) { *to = from[threadIdx.x]; }

__global__ void do_nothing() {}

__global__ void load_at(const std::byte* from, uint4* to) { *to = cuda::load_16(from); }

__global__ void store_at(std::byte* to) { cuda::store_16(to, uint4{}); }

template <class... P, class... A>
void run(void (*kernel)(P...), const A&... args) {
  cuda::load_kernel(kernel);
  cuda::run_kernel(kernel, args...);
}

const uint16_t* bits(const std::vector<Bf16>& x) { return reinterpret_cast<const uint16_t*>(x.data()); }

}  // namespace

std::vector<int> thread_order(int threads) {
  std::vector<int> order(threads);
  int next = 0;
  run(note_order, dim3{1}, dim3{static_cast<unsigned>(threads)}, 0, nullptr, order.data(), &next);
  return order;
}

std::vector<uint32_t> unwritten_shared(int count) {
  std::vector<uint32_t> out(count);
  run(read_unwritten, dim3{1}, dim3{32}, int64_t{4} * count, nullptr, out.data(), count);
  return out;
}

std::vector<int> neighbours(int threads, bool barrier) {
  std::vector<int> out(threads);
  run(read_neighbour, dim3{1}, dim3{static_cast<unsigned>(threads)}, 0, nullptr, out.data(), barrier);
  return out;
}

CopySeen asynchronous_copy(uint32_t value) {
  alignas(16) const uint32_t from[4] = {value, value, value, value};
  CopySeen seen{};
  run(copy_and_look, dim3{1}, dim3{1}, 0, nullptr, &from[0], &seen);
  return seen;
}

std::vector<float> multiply(const std::vector<Bf16>& a, const std::vector<Bf16>& b, bool by_matrices) {
  std::vector<float> d(16 * 8);
  run(multiply_fragments, dim3{1}, dim3{32}, 0, nullptr, bits(a), bits(b), d.data(), by_matrices);
  return d;
}

void half_a_warp_shuffles() { run(shuffle_in_half, dim3{1}, dim3{32}, 0, nullptr); }
void warps_at_different_barriers() { run(meet_apart, dim3{1}, dim3{64}, 0, nullptr); }
void some_threads_end_before_a_barrier() { run(leave_early, dim3{1}, dim3{64}, 0, nullptr); }
void write_past_shared() { run(write_shared, dim3{1}, dim3{32}, 0, nullptr, 1); }
void read_past_global() {
  const std::vector<int> from(31);
  int to = 0;
  run(read_global, dim3{1}, dim3{32}, 0, nullptr, from.data(), &to);
}
void load_16_from(int offset) {
  alignas(16) const std::byte from[64] = {};
  uint4 to{};
  run(load_at, dim3{1}, dim3{1}, 0, nullptr, &from[offset], &to);
}
void store_16_to(int offset) {
  alignas(16) std::byte to[64] = {};
  run(store_at, dim3{1}, dim3{1}, 0, nullptr, &to[offset]);
}
void launch_unloaded() { cuda::run_kernel(do_nothing, dim3{1}, dim3{1}, 0, nullptr); }
void too_much_shared_memory() { run(take_shared, dim3{1}, dim3{32}, 0, nullptr); }

}  // namespace moed::probes
