#pragma once

#include <mutex>

// Clang's thread-safety annotations; GCC sees nothing. `make lint` compiles them with -Wthread-safety -Werror.
#if defined(__clang__)
#define MOED_ANNOTATION_(x) __attribute__((x))
#else
#define MOED_ANNOTATION_(x)
#endif

#define MOED_GUARDED_BY(x) MOED_ANNOTATION_(guarded_by(x))
#define MOED_REQUIRES(...) MOED_ANNOTATION_(requires_capability(__VA_ARGS__))
#define MOED_EXCLUDES(...) MOED_ANNOTATION_(locks_excluded(__VA_ARGS__))

namespace moed {

// std::mutex that Clang's analysis can follow.
class MOED_ANNOTATION_(capability("mutex")) Mutex {
 public:
  void lock() MOED_ANNOTATION_(acquire_capability()) { mutex_.lock(); }
  void unlock() MOED_ANNOTATION_(release_capability()) { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

// A scoped lock; also a BasicLockable, so that std::condition_variable_any can wait on it.
class MOED_ANNOTATION_(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) MOED_ANNOTATION_(acquire_capability(mutex)) : mutex_(mutex) { mutex_.lock(); }
  ~MutexLock() MOED_ANNOTATION_(release_capability()) { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;
  // For condition_variable_any alone: it releases and takes the mutex again before it returns.
  void lock() MOED_ANNOTATION_(no_thread_safety_analysis) { mutex_.lock(); }
  void unlock() MOED_ANNOTATION_(no_thread_safety_analysis) { mutex_.unlock(); }

 private:
  Mutex& mutex_;
};

}  // namespace moed
