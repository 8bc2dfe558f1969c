#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "base/function_ref.h"

// Runs CUDA kernels on the host, one fiber a thread of the block, so that the op tests run them without a GPU. Lanes
// advance in seeded random order from one meeting point to the next. What a GPU leaves undefined is made to show:
// shared memory begins as NaN, asynchronous copies arrive at the wait and not before, each shared array is an
// allocation of its own (asan sees its bounds), and a warp or a block whose threads do not meet at the same place ends
// the process with one line. One thread of the host.
namespace moed::cuda_on_host {

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

// A place where threads meet, or wait for copies.
struct Site {
  std::string file;  // without folders
  int line = 0;
  enum class Kind : uint8_t { kBlock, kWarp, kCopies } kind = Kind::kBlock;
  friend bool operator==(const Site&, const Site&) = default;
};

// Seeds the order of lanes in launches from now on.
void set_seed(uint64_t seed);
// The __syncthreads, __syncwarp and copy_async_wait that launches have met since this was last asked.
std::vector<Site> take_sites();
// From now on threads pass this one as if it were not there; null: none is left out.
void drop(const Site* site);

struct Grid {
  Extent blocks;
  Extent threads;
  int64_t dynamic_bytes = 0;
};
void run_grid(const Grid& grid, FunctionRef<void()> kernel);

// A GPU loads a kernel at its first launch, in the middle of a pass: here a launch of one that was not loaded before
// ends the process.
void note_loaded(const void* kernel);
void check_loaded(const void* kernel);

// ---- for kernels

struct Lane {
  Extent thread;
  unsigned in_warp = 0;
};
struct Block {
  Extent index;
  Extent threads;
  Extent blocks;
};
const Lane& lane();
const Block& block();

std::byte* shared_array(const void* key, int64_t bytes);
std::byte* dynamic_shared();

void meet_block(const std::source_location& at);
void meet_warp(const std::source_location& at);

// All lanes of a warp show 32 bytes, meet, and read what the others show. What peek() gives lasts until the lane's next
// but one show().
void show(const void* data, int64_t bytes, const std::source_location& at);
const std::byte* peek(unsigned lane);

// Dies unless it is a multiple of `bytes`: on a GPU such an access ends the context.
void check_aligned(const void* address, unsigned bytes, const char* what);

void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int groups_left, const std::source_location& at);

}  // namespace moed::cuda_on_host
