#include "server/text_pool.h"

namespace moed {

TextPool::TextPool(int num_threads, size_t queue_max) : channel_(queue_max) {
  for (int i = 0; i < num_threads; ++i) {
    threads_.emplace_back([this] {
      while (auto task = channel_.receive()) (*task)();
    });
  }
}

TextPool::~TextPool() {
  channel_.close();
  for (std::thread& thread : threads_) thread.join();
}

}  // namespace moed
