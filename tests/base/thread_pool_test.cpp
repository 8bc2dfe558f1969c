#include "base/thread_pool.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace moed {
namespace {

TEST(ThreadPool, EachIndexRunsOnce) {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    ThreadPool pool(num_threads);
    ASSERT_EQ(pool.num_threads(), num_threads);
    for (const int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
      std::vector<std::atomic<int>> times(static_cast<size_t>(count));
      pool.run(count, [&](int64_t index, int thread) {
        ASSERT_GE(thread, 0);
        ASSERT_LT(thread, num_threads);
        times[static_cast<size_t>(index)].fetch_add(1);
      });
      for (int64_t i = 0; i < count; ++i) ASSERT_EQ(times[static_cast<size_t>(i)], 1) << i << " of " << count;
    }
  }
}

// Thousands of short runs, some after pauses in which the helpers fall asleep: a lost wake-up would hang, a late helper
// would count into the next run.
TEST(ThreadPool, ManyRuns) {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    ThreadPool pool(num_threads, false);
    int64_t sum = 0;  // written by one run's threads after another's: the pool must order them
    std::vector<int64_t> partial(static_cast<size_t>(num_threads) * 16);
    for (int run = 0; run < 5000; ++run) {
      std::fill(partial.begin(), partial.end(), 0);
      pool.run(5, [&](int64_t index, int thread) { partial[static_cast<size_t>(thread) * 16] += index + run; });
      for (const int64_t part : partial) sum += part;
      if (run % 1000 == 999) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT_EQ(sum, int64_t{5000} * 10 + int64_t{5} * 4999 * 5000 / 2);
  }
}

TEST(ThreadPool, ThreadNumbersAreExclusive) {
  ThreadPool pool(4, false);
  std::vector<std::atomic<bool>> inside(4);
  std::atomic<bool> clash{false};
  pool.run(2000, [&](int64_t, int thread) {
    if (inside[static_cast<size_t>(thread)].exchange(true)) clash = true;
    std::this_thread::yield();
    inside[static_cast<size_t>(thread)] = false;
  });
  EXPECT_FALSE(clash);
}

TEST(ThreadPool, HelpersTakePart) {
  ThreadPool pool(2, false);
  std::atomic<int> arrived{0};
  // Each index waits for the other: only two threads at once can finish.
  pool.run(2, [&](int64_t, int) {
    arrived.fetch_add(1);
    while (arrived.load() < 2) std::this_thread::yield();
  });
  EXPECT_EQ(arrived, 2);
}

TEST(ThreadPool, ManyPoolsComeAndGo) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(3, false);
    std::atomic<int> count{0};
    if (i % 2 == 0) pool.run(3, [&](int64_t, int) { count.fetch_add(1); });
    EXPECT_EQ(count, i % 2 == 0 ? 3 : 0);
  }
}

TEST(ThreadPool, DefaultIsWithinTheMachine) {
  EXPECT_GE(default_compute_threads(), 1);
  EXPECT_LE(default_compute_threads(), static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace
}  // namespace moed
