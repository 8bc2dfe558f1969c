#pragma once

#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

namespace moed {

// A vector that does not change; copies share its elements. For lists of a request that each of its choices keeps.
// Copies may be used by different threads.
template <class T>
class SharedVector {
 public:
  SharedVector() = default;
  SharedVector(std::vector<T> values)
      : values_(values.empty() ? nullptr : std::make_shared<const std::vector<T>>(std::move(values))) {}
  SharedVector(std::initializer_list<T> values) : SharedVector(std::vector<T>(values)) {}

  operator const std::vector<T>&() const {
    static const std::vector<T> none;
    return values_ == nullptr ? none : *values_;
  }
  const std::vector<T>& values() const { return *this; }
  const T* begin() const { return values().data(); }
  const T* end() const { return begin() + size(); }
  size_t size() const { return values().size(); }
  bool empty() const { return values_ == nullptr; }
  const T& operator[](size_t index) const { return values()[index]; }
  friend bool operator==(const SharedVector& a, const SharedVector& b) { return a.values() == b.values(); }

 private:
  std::shared_ptr<const std::vector<T>> values_;  // null: none
};

}  // namespace moed
