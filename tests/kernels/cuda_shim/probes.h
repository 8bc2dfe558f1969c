#pragma once

#include <cstdint>
#include <vector>

#include "base/bf16.h"

// Small kernels that show what cuda_on_host does with right and wrong ones.
namespace moed::probes {

// The order in which the threads of a block come by.
std::vector<int> thread_order(int threads);
// What a shared array holds that nobody wrote.
std::vector<uint32_t> unwritten_shared(int count);
// Each thread reads its neighbour's number; with or without a barrier in between.
std::vector<int> neighbours(int threads, bool barrier);
// 16 bytes by an asynchronous copy, read before and after the wait.
struct CopySeen {
  uint32_t before;
  uint32_t after;
};
CopySeen asynchronous_copy(uint32_t value);
// d = a b of 16 x 16 and 16 x 8, row-major. by_matrices: fragments come from load_matrices (b by the transposed one).
std::vector<float> multiply(const std::vector<Bf16>& a, const std::vector<Bf16>& b, bool by_matrices);

// 16 bytes that begin so many bytes after a multiple of 16; what is none dies.
void load_16_from(int offset);
void store_16_to(int offset);

// These die.
void launch_unloaded();
void half_a_warp_shuffles();
void warps_at_different_barriers();
void some_threads_end_before_a_barrier();
void too_much_shared_memory();
// Under asan.
void write_past_shared();
void read_past_global();

}  // namespace moed::probes
