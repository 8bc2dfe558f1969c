#include "server/text_pool.h"

namespace moed {

TextPool::TextPool(int num_threads, size_t queue_max, int64_t bytes_max) : bytes_max_(bytes_max), channel_(queue_max) {
  for (int i = 0; i < num_threads; ++i) {
    threads_.emplace_back([this] {
      while (auto task = channel_.receive()) task->run();
    });
  }
}

TextPool::~TextPool() {
  channel_.close();
  for (std::thread& thread : threads_) thread.join();
}

Status TextPool::try_post(std::function<void()> task, int64_t bytes) {
  const int64_t before = bytes_.fetch_add(bytes);
  Task item{Hold(bytes_, bytes), std::move(task)};
  if (before > 0 && before + bytes > bytes_max_) {
    return Status(StatusCode::kResourceExhausted, "too much text waits to be tokenised (limits.queued_text_bytes_max)");
  }
  if (!channel_.try_send(item)) {
    return Status(StatusCode::kResourceExhausted, "too many requests wait to be tokenised (scheduler.queue_max)");
  }
  return Status();
}

}  // namespace moed
