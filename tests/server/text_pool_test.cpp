#include "server/text_pool.h"

#include <gtest/gtest.h>

#include <future>

namespace moed {
namespace {

TEST(TextPoolTest, BoundedInTasksAndInBytes) {
  std::promise<void> go;
  const std::shared_future<void> gate = go.get_future().share();
  std::atomic<int> ran{0};
  const auto task = [&ran, gate] {
    gate.wait();
    ++ran;
  };
  TextPool pool(1, 4, 100);
  // Alone, a task may be larger than the limit.
  ASSERT_TRUE(pool.try_post(task, 120).ok());
  const Status bytes = pool.try_post(task, 1);
  EXPECT_EQ(bytes.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(bytes.message().find("limits.queued_text_bytes_max"), std::string::npos) << bytes.message();
  EXPECT_EQ(pool.bytes(), 120) << "what was refused holds nothing";
  EXPECT_EQ(ran, 0);
  go.set_value();
  while (pool.bytes() > 0) std::this_thread::yield();
  EXPECT_TRUE(pool.try_post(task, 60).ok()) << "room again";
}

TEST(TextPoolTest, AFullQueueRefuses) {
  std::promise<void> go, begun;
  const std::shared_future<void> gate = go.get_future().share();
  TextPool pool(1, 2, 100);
  ASSERT_TRUE(pool.try_post(
                      [&begun, gate] {
                        begun.set_value();
                        gate.wait();
                      },
                      10)
                  .ok());
  begun.get_future().wait();
  EXPECT_TRUE(pool.try_post([] {}, 10).ok());
  EXPECT_TRUE(pool.try_post([] {}, 10).ok());
  const Status full = pool.try_post([] {}, 10);
  EXPECT_EQ(full.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(full.message().find("scheduler.queue_max"), std::string::npos) << full.message();
  EXPECT_EQ(pool.bytes(), 30);
  go.set_value();
}

}  // namespace
}  // namespace moed
