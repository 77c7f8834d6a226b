// What threads need that train a network together: a barrier, memory apart from each other's.
#pragma once

#include <thread>

#include "common.h"

namespace fastnet {
namespace {

// Holds threads until all have come. They come within microseconds of each other, and wait awake;
// only where there are fewer cores than threads is one of them let go.
class SpinBarrier {
 public:
  explicit SpinBarrier(int count) : count_(count) {}

  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kPatience) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kPatience = 2'000;  // some 30 microseconds
  const int count_;
  alignas(64) std::atomic<int> arrived_ = 0;
  alignas(64) std::atomic<int> round_ = 0;
};

// Memory from a cache line on, with as much behind the last number as a vector reads: of zeros, or
// of what happens to be there.
template <class Number>
class Numbers {
 public:
  explicit Numbers(int64_t size = 0) : lines_(new Line[lines_of(size)]()) {}
  static Numbers unset(int64_t size) {
    Numbers numbers;
    numbers.lines_ = std::make_unique_for_overwrite<Line[]>(lines_of(size));
    return numbers;
  }
  operator Number*() const { return lines_[0].numbers; }

 private:
  static int64_t lines_of(int64_t size) { return divide_up(size, Line::kCount) + 2; }
  struct alignas(64) Line {
    static constexpr int64_t kCount = 64 / sizeof(Number);
    Number numbers[kCount];
  };
  std::unique_ptr<Line[]> lines_;
};
using Floats = Numbers<float>;

// While it lives its thread takes numbers below 1.2e-38, which have not all their digits, as 0. The
// averages of a unit that has no gradient any more end there, and a processor is slow with them.
class TinyAsZero {
 public:
#if defined(__x86_64__)
  explicit TinyAsZero(bool wanted) : before_(__builtin_ia32_stmxcsr()) {
    constexpr unsigned kInputs = 1 << 6, kResults = 1 << 15;
    if (wanted) __builtin_ia32_ldmxcsr(before_ | kInputs | kResults);
  }
  ~TinyAsZero() { __builtin_ia32_ldmxcsr(before_); }

 private:
  const unsigned before_;
#else
  explicit TinyAsZero(bool) {}
#endif
};

}  // namespace
}  // namespace fastnet
