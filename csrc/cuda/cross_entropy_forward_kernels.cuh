// The kernels of cross_entropy's forward: a warp, a block or several of them, or a thread to a row.
#pragma once

#include "cross_entropy_row.cuh"

namespace fastnet {
namespace {

inline constexpr int kRowWarps = 8, kMaxWarps = 32;

// Warps of a block that is alone in its grid: all there can be, where a thread's row leaves it with
// 64 registers, which is what 1,024 threads have each.
template <class T, int kPerLane>
inline constexpr int kRowWarpsAlone = kPerLane * sizeof(acc_t<T>) <= 32 ? kMaxWarps : kRowWarps;

// Sums over a block's warps of numbers that their first lanes have, in its first warp. The order of
// additions is fixed. `shared` has room for each warp's.
template <int kNumbers>
__device__ __forceinline__ void sum_warps(double (&sums)[kNumbers], double (*shared)[kNumbers],
                                          int warp, int warps) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) {
    if (lane == 0) shared[warp][i] = sums[i];
  }
  __syncthreads();  // the first warp reads what every warp has written
  if (warp > 0) return;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) sums[i] = warp_sum(lane < warps ? shared[lane][i] : 0.0);
}

// One warp per row, kPerLane classes to a lane: 32 · kPerLane >= C. A block that is alone in its
// grid also sums the rows' losses: the whole loss is one launch.
template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarp* kRowWarpsAlone<T, kPerLane>)
    warp_row_kernel(CrossEntropyCall<T> call) {
  using A = acc_t<T>;
  __shared__ double of_warps[kMaxWarps][2];
  const int lane = threadIdx.x, warps = blockDim.y;
  const int classes = static_cast<int>(call.C);  // at most 32 · kPerLane
  const int64_t step = kWarp * call.logits_at.cls;
  double sums_of_rows[2] = {};  // losses, counts
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.y; row < call.rows;
       row += static_cast<int64_t>(gridDim.x) * warps) {
    const T* const x = call.logits + call.first(call.logits_at, row) + lane * call.logits_at.cls;
    A values[kPerLane];
    Sums<A> sums{minus_infinity<A>(), 0, 0, 0};
    // Of classes side by side every load has its address but for a constant.
    if (step == kWarp) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        values[i] = lane + i * kWarp < classes ? widen(x[i * kWarp]) : minus_infinity<A>();
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        values[i] = lane + i * kWarp < classes ? widen(x[i * step]) : minus_infinity<A>();
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums.maximum = fmax(sums.maximum, values[i]);
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sums.maximum = fmax(sums.maximum, __shfl_xor_sync(0xffffffffu, sums.maximum, offset));
    }
    const A shift = shift_of(sums.maximum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums.exps += exp_of(values[i] - shift);
    sums.exps = warp_sum(sums.exps);
    if (call.needs_dot) {
      const T* const target = call.target_of(row);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int c = lane + i * kWarp;
        if (c >= classes) continue;
        const A q = call.q(target, c);
        sums.q += q;
        sums.dot += q * (values[i] - shift);
      }
      sums.q = warp_sum(sums.q);
      sums.dot = warp_sum(sums.dot);
    }
    if (lane == 0) {
      const RowResult<A> result = finish_row(call, row, sums);
      sums_of_rows[0] += static_cast<double>(result.loss);
      sums_of_rows[1] += static_cast<double>(result.count);
    }
  }
  if (!call.loss) return;  // the same for every thread, so none waits below
  sum_warps(sums_of_rows, of_warps, static_cast<int>(threadIdx.y), warps);
  if (lane == 0 && threadIdx.y == 0) {
    const auto [loss, count] = sums_of_rows;
    *call.divisor = static_cast<A>(count);
    *call.loss = static_cast<A>(call.is_mean ? loss / count : loss);
  }
}

// Adds to a row's sums the packs from c on, `step` classes apart, x from its first class on.
// kWhole: all of them begin before `end`; else only the first is sure to.
//
// The maximum passes over NaN, which comes into the sum of exponentials all the same.
template <bool kWhole, bool kNeedsDot, int kCount, class T>
__device__ __forceinline__ void add_packs(const CrossEntropyCall<T>& call, const T* x,
                                          const T* target, int64_t c, int64_t end, int64_t step,
                                          int64_t x_step, Sums<acc_t<T>>& sums) {
  using A = acc_t<T>;
  constexpr int kThere = kPacks<T, kCount>;
  Pack<T, kCount> packs[kThere];
  load_packs(x, c, kWhole ? c + kThere * step : end, step, x_step, packs);
  A values[kThere][kCount];
  A most = minus_infinity<A>();
#pragma unroll
  for (int p = 0; p < kThere; ++p) {
    if (!kWhole && c + p * step >= end) break;
    widen(packs[p], values[p]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) most = fmax(most, values[p][i]);
  }
  sums.raise(most);
  const A shift = shift_of(sums.maximum);
#pragma unroll
  for (int p = 0; p < kThere; ++p) {
    if (!kWhole && c + p * step >= end) break;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums.exps += exp_of(values[p][i] - shift);
      if constexpr (kNeedsDot) {
        const A q = call.q(target, c + p * step + i);
        sums.q += q;
        sums.dot += q * (values[p][i] - shift);
      }
    }
  }
}

// What a block of kRowThreads sums over a row's classes from `begin` to `end`, x from the first
// class on: in the first thread. The second argument is the block's own memory.
template <bool kNeedsDot, int kCount, class T>
__device__ __forceinline__ Sums<acc_t<T>> block_sums(const CrossEntropyCall<T>& call,
                                                     Sums<acc_t<T>>* warps, const T* x,
                                                     const T* target, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kStep = int64_t{kRowThreads} * kCount;
  constexpr int64_t kTurn = kPacks<T, kCount> * kStep;
  const int64_t x_step = kCount > 1 ? 1 : call.logits_at.cls;
  Sums<A> sums{minus_infinity<A>(), 0, 0, 0};
  int64_t c = begin + static_cast<int64_t>(threadIdx.x) * kCount;
  for (; c + (kTurn - kStep) < end; c += kTurn) {
    add_packs<true, kNeedsDot, kCount>(call, x, target, c, end, kStep, x_step, sums);
  }
  if (c < end) add_packs<false, kNeedsDot, kCount>(call, x, target, c, end, kStep, x_step, sums);
  sums = warp_add(sums);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();  // the first thread reads what every warp has written
  if (threadIdx.x == 0) {
    for (int w = 1; w < kRowThreads / kWarp; ++w) sums.add(warps[w]);
  }
  return sums;
}

// gridDim.x blocks per row, each for a share of `share` classes, kCount of them at a time. A block
// that has a row for itself finishes it; else what it summed goes to parts (rows, gridDim.x).
template <class T, int kCount, bool kNeedsDot>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T>)
    block_row_kernel(CrossEntropyCall<T> call, Sums<acc_t<T>>* parts, int64_t share,
                     int64_t first_row) {
  __shared__ Sums<acc_t<T>> warps[kRowThreads / kWarp];
  const int64_t row = first_row + blockIdx.y;
  const int64_t begin = blockIdx.x * share;
  const int64_t end = begin + share < call.C ? begin + share : call.C;
  const T* const x = call.logits + call.first(call.logits_at, row);
  const T* const target = kNeedsDot ? call.target_of(row) : nullptr;
  const Sums<acc_t<T>> sums = block_sums<kNeedsDot, kCount>(call, warps, x, target, begin, end);
  if (threadIdx.x != 0) return;
  if (parts) {
    parts[row * gridDim.x + blockIdx.x] = sums;
  } else {
    finish_row(call, row, sums);
  }
}

inline constexpr int kFinishThreads = 128;

// parts (rows, count) → the rows' ends. A warp to a row, each lane with every 32nd part: the order
// is fixed.
template <class T>
__global__ void finish_rows_kernel(CrossEntropyCall<T> call, const Sums<acc_t<T>>* parts,
                                   int64_t count) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kFinishThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= call.rows) return;  // the whole warp leaves
  Sums<A> sums{minus_infinity<A>(), 0, 0, 0};
  for (int64_t i = lane; i < count; i += kWarp) sums.add(parts[row * count + i]);
  sums = warp_add(sums);
  if (lane == 0) finish_row(call, row, sums);
}

// A thread per row, where neighbouring rows lie side by side.
template <class T>
__global__ void position_kernel(CrossEntropyCall<T> call) {
  using A = acc_t<T>;
  constexpr int kAtOnce = 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPositionThreads + threadIdx.x;
  if (row >= call.rows) return;
  const T* const x = call.logits + call.first(call.logits_at, row);
  const T* const target = call.target_of(row);
  Sums<A> sums{minus_infinity<A>(), 0, 0, 0};
  for (int64_t c = 0; c < call.C; c += kAtOnce) {
    A values[kAtOnce];
    A most = minus_infinity<A>();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = c + i < call.C ? widen(x[(c + i) * call.logits_at.cls]) : minus_infinity<A>();
      most = fmax(most, values[i]);
    }
    sums.raise(most);
    const A shift = shift_of(sums.maximum);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (c + i >= call.C) continue;
      sums.exps += exp_of(values[i] - shift);
      if (call.needs_dot) {
        const A q = call.q(target, c + i);
        sums.q += q;
        sums.dot += q * (values[i] - shift);
      }
    }
  }
  finish_row(call, row, sums);
}

inline constexpr int kSumThreads = 1024;

// The losses' sum or mean, and the mean's divisor, in one block: the order is fixed.
template <class A>
__global__ void sum_losses_kernel(const A* losses, const A* counts, int64_t rows, A* loss,
                                  A* divisor, bool is_mean) {
  __shared__ double of_warps[kSumThreads / kWarp][2];
  double sums[2] = {};  // losses, counts
  for (int64_t row = threadIdx.x; row < rows; row += kSumThreads) {
    if (loss) sums[0] += static_cast<double>(losses[row]);
    sums[1] += static_cast<double>(counts[row]);
  }
  for (double& sum : sums) sum = warp_sum(sum);
  sum_warps(sums, of_warps, static_cast<int>(threadIdx.x) / kWarp, kSumThreads / kWarp);
  if (threadIdx.x != 0) return;
  *divisor = static_cast<A>(sums[1]);
  if (loss) *loss = static_cast<A>(is_mean ? sums[0] / sums[1] : sums[0]);
}

}  // namespace
}  // namespace fastnet
