#include "tests/kernels/cuda_shim/cuda_on_host.h"

#include <algorithm>
#include <array>
#include <boost/context/fiber.hpp>
#include <boost/context/protected_fixedsize_stack.hpp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>

namespace moed::cuda_on_host {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kThreadsMax = 1024;
// What every GPU since sm_80 grants: statically, and to a block that asks for it (sm_86 and sm_89 have the least).
constexpr int64_t kStaticBytesMax = int64_t{48} << 10;
constexpr int64_t kSharedBytesMax = int64_t{99} << 10;
constexpr unsigned kGridMax = 65535;  // in y and z
constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kShownBytes = 32;

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what.c_str());
  std::abort();
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15U + 1) {}
  unsigned below(unsigned n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<unsigned>((state_ >> 32) % n);
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(static_cast<unsigned>(i))]);
  }

 private:
  uint64_t state_;
};

std::set<const void*>& loaded_kernels() {
  static std::set<const void*> kernels;
  return kernels;
}

enum class State : uint8_t { kRunnable, kAtWarp, kAtBlock, kDone };

struct Copy {
  void* to = nullptr;
  const void* from = nullptr;
  int bytes = 0;
};

using Shown = std::array<std::byte, kShownBytes>;

struct Thread {
  Lane lane;
  State state = State::kDone;
  std::source_location at;
  std::array<Shown, 2> shown;  // turn by turn: a slow reader still sees what the last but one meeting showed
  unsigned num_shown = 0;
  std::vector<Copy> copies;              // of the open group
  std::deque<std::vector<Copy>> groups;  // closed, oldest first
  boost::context::fiber fiber;
  boost::context::fiber scheduler;
};

struct Array {
  std::unique_ptr<std::byte[]> data;
  int64_t bytes = 0;
};

// NaN as fp32 and as bf16, and an index that no array has.
Array poisoned(int64_t bytes) {
  Array array{std::make_unique<std::byte[]>(bytes), bytes};
  std::memset(array.data.get(), 0xFF, bytes);
  return array;
}

struct Visited {
  const char* file = nullptr;
  Site site;
  bool dropped = false;
};

struct Machine {
  uint64_t seed = 1;
  std::vector<Visited> sites;
  std::optional<Site> dropped;
  std::vector<std::unique_ptr<Thread>> threads;  // made once, reused by every block
  const FunctionRef<void()>* kernel = nullptr;
  Thread* current = nullptr;
  Block block;
  std::map<const void*, Array> arrays;
  Array dynamic;
  int64_t static_bytes = 0;
};

// Never destroyed: its fibers wait in the middle of a loop.
Machine& machine() {
  static auto* const all = new Machine;
  return *all;
}

std::string describe(const std::source_location& at) {
  return std::string(at.file_name()) + ":" + std::to_string(at.line());
}

bool same(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// False when the place is to be passed as if nothing stood there.
bool visit(Site::Kind kind, const std::source_location& at) {
  Machine& m = machine();
  const auto line = static_cast<int>(at.line());
  // All of a block's threads come by in turn: mostly the place is the last one.
  for (size_t i = m.sites.size(); i > 0; --i) {
    const Visited& known = m.sites[i - 1];
    if (known.file == at.file_name() && known.site.line == line) return !known.dropped;
  }
  const std::string file = at.file_name();
  Site site{file.substr(file.find_last_of('/') + 1), line, kind};
  const bool dropped = m.dropped == site;
  m.sites.push_back({at.file_name(), std::move(site), dropped});
  return !dropped;
}

void pause(State state, const std::source_location& at) {
  Thread& me = *machine().current;
  me.state = state;
  me.at = at;
  me.scheduler = std::move(me.scheduler).resume();
}

void make_threads(size_t count) {
  Machine& m = machine();
  while (m.threads.size() < count) {
    m.threads.push_back(std::make_unique<Thread>());
    Thread* thread = m.threads.back().get();
    thread->fiber = boost::context::fiber(std::allocator_arg, boost::context::protected_fixedsize_stack(kStackBytes),
                                          [thread](boost::context::fiber&& back) {
                                            thread->scheduler = std::move(back);
                                            for (;;) {
                                              (*machine().kernel)();
                                              thread->state = State::kDone;
                                              thread->scheduler = std::move(thread->scheduler).resume();
                                            }
                                            return std::move(back);
                                          });
  }
}

// One block from its first thread's start to its last one's end.
class BlockRun {
 public:
  BlockRun(unsigned num_threads, Random& random)
      : num_threads_(num_threads), num_warps_((num_threads + kWarpSize - 1) / kWarpSize), random_(random) {
    in_turn_ = random_.below(2) == 0;
    for (unsigned warp = 0; warp < num_warps_; ++warp) order_.push_back(warp);
    random_.shuffle(order_);
    runnable_.resize(num_warps_);
    at_warp_.assign(num_warps_, 0);
    for (unsigned i = 0; i < num_threads_; ++i) runnable_[i / kWarpSize].push_back(i);
  }

  void run() {
    unsigned alive = num_threads_;
    unsigned at_block = 0;
    while (alive > 0) {
      const std::optional<unsigned> next = pick();
      if (!next) {
        release_block(alive, at_block);
        at_block = 0;
        continue;
      }
      Thread& thread = resume(*next);
      if (thread.state == State::kDone) --alive;
      if (thread.state == State::kAtBlock) ++at_block;
      if (thread.state == State::kAtWarp && ++at_warp_[*next / kWarpSize] == warp_threads(*next / kWarpSize)) {
        release_warp(*next / kWarpSize);
      }
    }
  }

 private:
  unsigned warp_threads(unsigned warp) const { return std::min(kWarpSize, num_threads_ - warp * kWarpSize); }

  // Half of the blocks let warps run ahead of one another as far as they can, half mix them.
  std::optional<unsigned> pick() {
    if (!in_turn_) random_.shuffle(order_);
    for (const unsigned warp : order_) {
      std::vector<unsigned>& lanes = runnable_[warp];
      if (lanes.empty()) continue;
      std::swap(lanes.back(), lanes[random_.below(static_cast<unsigned>(lanes.size()))]);
      const unsigned chosen = lanes.back();
      lanes.pop_back();
      return chosen;
    }
    return std::nullopt;
  }

  Thread& resume(unsigned index) {
    Machine& m = machine();
    Thread& thread = *m.threads[index];
    m.current = &thread;
    thread.fiber = std::move(thread.fiber).resume();
    m.current = nullptr;
    return thread;
  }

  void release_warp(unsigned warp) {
    Machine& m = machine();
    const unsigned first = warp * kWarpSize;
    for (unsigned i = first; i < first + warp_threads(warp); ++i) {
      Thread& thread = *m.threads[i];
      if (!same(thread.at, m.threads[first]->at)) {
        die("lanes of a warp meet at different places: " + describe(m.threads[first]->at) + " and " +
            describe(thread.at));
      }
      thread.state = State::kRunnable;
      runnable_[warp].push_back(i);
    }
    at_warp_[warp] = 0;
  }

  void release_block(unsigned alive, unsigned at_block) {
    Machine& m = machine();
    const Thread* first = nullptr;
    for (unsigned i = 0; i < num_threads_; ++i) {
      Thread& thread = *m.threads[i];
      if (thread.state == State::kAtWarp) {
        die("a warp waits for lanes that do not come, at " + describe(thread.at));
      }
      if (thread.state != State::kAtBlock) continue;
      if (first == nullptr) first = &thread;
      if (!same(thread.at, first->at)) {
        die("threads of a block meet at different places: " + describe(first->at) + " and " + describe(thread.at));
      }
    }
    if (at_block != alive) die("threads ended while others wait");
    for (unsigned i = 0; i < num_threads_; ++i) {
      if (m.threads[i]->state != State::kAtBlock) continue;
      m.threads[i]->state = State::kRunnable;
      runnable_[i / kWarpSize].push_back(i);
    }
    random_.shuffle(order_);
  }

  unsigned num_threads_;
  unsigned num_warps_;
  Random& random_;
  bool in_turn_ = false;
  std::vector<unsigned> order_;                  // of warps
  std::vector<std::vector<unsigned>> runnable_;  // [warps]: threads
  std::vector<unsigned> at_warp_;                // [warps]: lanes that wait for the others
};

void check_grid(const Grid& grid, unsigned num_threads) {
  if (num_threads == 0 || num_threads > kThreadsMax) die("a block of " + std::to_string(num_threads) + " threads");
  if (grid.blocks.y > kGridMax || grid.blocks.z > kGridMax) {
    die("a grid of " + std::to_string(grid.blocks.y) + " x " + std::to_string(grid.blocks.z) + " in y and z");
  }
}

void run_block(const Grid& grid, const Extent& index, unsigned num_threads, Random& random) {
  Machine& m = machine();
  m.block = {index, grid.threads, grid.blocks};
  m.arrays.clear();
  m.static_bytes = 0;
  m.dynamic = poisoned(grid.dynamic_bytes);
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& thread = *m.threads[i];
    thread.lane.thread = {i % grid.threads.x, i / grid.threads.x % grid.threads.y, i / grid.threads.x / grid.threads.y};
    thread.lane.in_warp = i % kWarpSize;
    thread.state = State::kRunnable;
    thread.copies.clear();
    thread.groups.clear();
  }
  BlockRun(num_threads, random).run();
}

}  // namespace

void set_seed(uint64_t seed) { machine().seed = seed; }
std::vector<Site> take_sites() {
  std::vector<Site> sites;
  for (Visited& visited : machine().sites) sites.push_back(std::move(visited.site));
  machine().sites.clear();
  return sites;
}
void drop(const Site* site) {
  machine().dropped = site == nullptr ? std::optional<Site>() : std::optional<Site>(*site);
  machine().sites.clear();
}

void run_grid(const Grid& grid, FunctionRef<void()> kernel) {
  Machine& m = machine();
  const unsigned num_threads = grid.threads.x * grid.threads.y * grid.threads.z;
  check_grid(grid, num_threads);
  make_threads(num_threads);
  m.kernel = &kernel;
  Random random(m.seed++);
  // Blocks owe each other nothing: any order must do.
  std::vector<Extent> blocks;
  for (unsigned z = 0; z < grid.blocks.z; ++z) {
    for (unsigned y = 0; y < grid.blocks.y; ++y) {
      for (unsigned x = 0; x < grid.blocks.x; ++x) blocks.push_back({x, y, z});
    }
  }
  random.shuffle(blocks);
  for (const Extent& block_index : blocks) run_block(grid, block_index, num_threads, random);
}

const Lane& lane() { return machine().current->lane; }
const Block& block() { return machine().block; }

std::byte* shared_array(const void* key, int64_t bytes) {
  Machine& m = machine();
  Array& array = m.arrays[key];
  if (array.data == nullptr) {
    array = poisoned(bytes);
    m.static_bytes += bytes;
    if (m.static_bytes > kStaticBytesMax || m.static_bytes + m.dynamic.bytes > kSharedBytesMax) {
      die("shared memory of " + std::to_string(m.static_bytes) + " + " + std::to_string(m.dynamic.bytes) + " bytes");
    }
  }
  return array.data.get();
}

std::byte* dynamic_shared() {
  if (machine().dynamic.bytes > kSharedBytesMax) {
    die("dynamic shared memory of " + std::to_string(machine().dynamic.bytes) + " bytes");
  }
  return machine().dynamic.data.get();
}

void meet_block(const std::source_location& at) {
  if (visit(Site::Kind::kBlock, at)) pause(State::kAtBlock, at);
}

void meet_warp(const std::source_location& at) {
  if (visit(Site::Kind::kWarp, at)) pause(State::kAtWarp, at);
}

void show(const void* data, int64_t bytes, const std::source_location& at) {
  Thread& me = *machine().current;
  if (bytes > static_cast<int64_t>(kShownBytes)) die("a lane shows more than it may");
  std::memcpy(me.shown[++me.num_shown % 2].data(), data, bytes);
  pause(State::kAtWarp, at);
}

const std::byte* peek(unsigned from) {
  Machine& m = machine();
  const unsigned me = m.current->lane.in_warp;
  const Extent& t = m.current->lane.thread;
  const unsigned index = t.x + m.block.threads.x * (t.y + m.block.threads.y * t.z);
  const Thread& other = *m.threads[index - me + from];
  // All lanes of a warp have shown equally often by the time they have met.
  return other.shown[m.current->num_shown % 2].data();
}

void check_aligned(const void* address, unsigned bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) die(std::string(what) + " is not aligned");
}

void note_loaded(const void* kernel) { loaded_kernels().insert(kernel); }

void check_loaded(const void* kernel) {
  if (!loaded_kernels().contains(kernel)) die("launch of a kernel that was not loaded (load_kernels())");
}

void copy_async(void* to, const void* from, int bytes) {
  check_aligned(to, 16, "an asynchronous copy's target");
  if (bytes > 0) check_aligned(from, 16, "an asynchronous copy's source");
  std::memset(to, 0xFF, 16);
  machine().current->copies.push_back({to, from, bytes});
}

void commit_copies() {
  Thread& me = *machine().current;
  me.groups.push_back(std::move(me.copies));
  me.copies.clear();
}

void wait_for_copies(int groups_left, const std::source_location& at) {
  if (!visit(Site::Kind::kCopies, at)) return;
  Thread& me = *machine().current;
  while (static_cast<int>(me.groups.size()) > groups_left) {
    for (const Copy& copy : me.groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    me.groups.pop_front();
  }
}

}  // namespace moed::cuda_on_host
