// What the CPU side of every op shares: elements as the kernels see them, and threads.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <type_traits>
#include <vector>

#include "../common.h"
#include "isa.h"

namespace fastnet {

// How the kernels see elements of T in memory.
template <class T>
using element_t = std::conditional_t<std::is_same_v<T, torch::headeronly::BFloat16>, bfloat16, T>;

template <class T>
const element_t<T>* data(const Tensor& tensor) {
  return static_cast<const element_t<T>*>(tensor.const_data_ptr());
}
template <class T>
element_t<T>* mutable_data(Tensor& tensor) {
  return static_cast<element_t<T>*>(tensor.mutable_data_ptr());
}

// A tensor of many megabytes is fresh memory at every step, as the C library keeps no block beyond
// so many bytes: a good part of the time went into its page faults, one every 4 kB. With huge pages
// there is one every 2 MB.
inline constexpr int64_t kFreshBytes = int64_t{32} << 20;

inline Tensor in_huge_pages(Tensor tensor, int64_t least_bytes = kFreshBytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{2} << 20;
  const int64_t bytes = tensor.numel() * tensor.element_size();
  if (bytes < least_bytes) return tensor;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish; may fail
  }
#endif
  return tensor;
}

inline int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// A stretch of memory of the calling thread's, kept for its next call: what a fresh one costs, in
// pages that the system has to clear, is felt at these sizes. Begins on a cache line; its content
// is arbitrary. There are two, 0 for a thread's own part of the work and 1 for what all share.
template <class A, int kWhich = 0>
A* thread_scratch(int64_t count) {
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  thread_local std::vector<Line> memory;
  const size_t lines = (static_cast<size_t>(count) * sizeof(A) + sizeof(Line) - 1) / sizeof(Line);
  if (memory.size() < lines) {
    memory.clear();  // nothing to copy over
    memory.resize(lines);
  }
  return reinterpret_cast<A*>(memory.data());
}

// What a thread may keep so, in elements.
template <class A>
constexpr int64_t most_scratch() {
  return (8 << 20) / sizeof(A);
}

// Floats in the widest vector of any instruction set.
inline constexpr int64_t kWidestVector = 16;

// Multiply-adds below which a second thread costs more than it brings.
inline constexpr int64_t kWorkPerThread = 100'000;

// Runs body(begin, end) over [0, items), on several threads where the work is worth it.
template <class Body>
void parallel(int64_t items, int64_t work_per_item, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_item));
  if (items <= grain) {
    if (items > 0) body(0, items);
  } else {
    torch::stable::parallel_for(0, items, grain, body);
  }
}

// The same for items whose results do not depend on how they are divided: a thread that has done
// its part takes another, so that one which is held up, by other programs or for being a slower
// core, does not hold up the rest.
template <class Body>
void parallel_in_turns(int64_t items, int64_t work_per_item, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || items * work_per_item <= kWorkPerThread) {
    if (items > 0) body(0, items);
    return;
  }
  const int64_t turn = std::max<int64_t>(1, items / (8 * threads));
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(turn)) < items;) {
      body(begin, std::min(items, begin + turn));
    }
  });
}

}  // namespace fastnet
