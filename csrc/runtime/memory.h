// Memory on 2 MiB pages where the system has them: a recurrent weight matrix is read whole in every time step.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "runtime/huge_pages.h"

namespace fastkd::runtime {

class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes) : bytes_(bytes) {
    constexpr int64_t kLine = 64, kHugePage = 2 << 20;
    const int64_t alignment = bytes < kHugePage / 2 ? kLine : kHugePage;
    const int64_t whole = (bytes + alignment) / alignment * alignment;
    memory_.reset((char*)std::aligned_alloc(alignment, whole));
    if (!memory_) throw std::bad_alloc();
    prefer_huge_pages(memory_.get(), whole);
    std::memset(memory_.get(), 0, whole);
  }

  template <class T = char>
  T* as() const {
    return (T*)memory_.get();
  }
  int64_t bytes() const { return memory_ ? bytes_ : 0; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char[], Free> memory_;
  int64_t bytes_ = 0;
};

// Memory of undefined content for the length of a call, kept by its thread for the next one unless it is very large.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    std::vector<Memory>& kept = shelf();
    auto best = kept.end();
    for (auto it = kept.begin(); it != kept.end(); ++it)
      if (it->bytes() >= bytes && (best == kept.end() || it->bytes() < best->bytes())) best = it;
    if (best != kept.end()) {
      memory_ = std::move(*best);
      kept.erase(best);
    }
    if (memory_.bytes() < bytes) memory_ = Memory(bytes + bytes / 4);
  }
  Scratch(Scratch&&) = default;
  ~Scratch() {
    constexpr size_t kShelf = 16;
    constexpr int64_t kLargest = 64 << 20;
    if (memory_.bytes() > 0 && memory_.bytes() <= kLargest && shelf().size() < kShelf)
      shelf().push_back(std::move(memory_));
  }

  template <class T>
  T* as() const {
    return memory_.as<T>();
  }

 private:
  static std::vector<Memory>& shelf() {
    thread_local std::vector<Memory> memories;
    return memories;
  }
  Memory memory_;
};

}  // namespace fastkd::runtime
