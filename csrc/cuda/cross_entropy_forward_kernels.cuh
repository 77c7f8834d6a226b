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

// One warp per row, kPerLane classes to a lane: 32 · kPerLane >= C. A block that is alone in its
// grid also sums the rows' losses: the whole loss is one launch.
template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarp* kRowWarpsAlone<T, kPerLane>)
    warp_row_kernel(CrossEntropyCall<T> call) {
  using A = acc_t<T>;
  __shared__ double loss_sums[kMaxWarps], count_sums[kMaxWarps];
  const int lane = threadIdx.x, warps = blockDim.y;
  double loss_sum = 0, count_sum = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.y; row < call.rows;
       row += static_cast<int64_t>(gridDim.x) * warps) {
    const T* const x = call.logits + call.first(call.logits_at, row);
    A values[kPerLane];
    Sums<A> sums{minus_infinity<A>(), 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int64_t c = lane + i * kWarp;
      values[i] = c < call.C ? widen(x[c * call.logits_at.cls]) : minus_infinity<A>();
      if (sums.maximum < values[i]) sums.maximum = values[i];
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const A other = __shfl_xor_sync(0xffffffffu, sums.maximum, offset);
      if (sums.maximum < other) sums.maximum = other;
    }
    const A shift = shift_of(sums.maximum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums.exps += exp(values[i] - shift);
    sums.exps = warp_sum(sums.exps);
    if (call.needs_dot) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int64_t c = lane + i * kWarp;
        if (c >= call.C) continue;
        const A q = call.q(row, c);
        sums.q += q;
        sums.dot += q * (values[i] - shift);
      }
      sums.q = warp_sum(sums.q);
      sums.dot = warp_sum(sums.dot);
    }
    if (lane == 0) {
      const RowResult<A> result = finish_row(call, row, sums);
      loss_sum += static_cast<double>(result.loss);
      count_sum += static_cast<double>(result.count);
    }
  }
  if (!call.loss) return;  // the same for every thread, so none waits below
  if (lane == 0) {
    loss_sums[threadIdx.y] = loss_sum;
    count_sums[threadIdx.y] = count_sum;
  }
  __syncthreads();  // the first thread reads what every warp has written
  if (lane == 0 && threadIdx.y == 0) {
    for (int w = 1; w < warps; ++w) {
      loss_sum += loss_sums[w];
      count_sum += count_sums[w];
    }
    *call.divisor = static_cast<A>(count_sum);
    *call.loss = static_cast<A>(call.is_mean ? loss_sum / count_sum : loss_sum);
  }
}

// gridDim.x blocks per row, each for a share of `share` classes, kCount of them at a time. A block
// that has a row for itself finishes it; else what it summed goes to parts (rows, gridDim.x).
template <class T, int kCount>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    block_row_kernel(CrossEntropyCall<T> call, Sums<acc_t<T>>* parts, int64_t share,
                     int64_t first_row) {
  using A = acc_t<T>;
  constexpr int64_t kStep = int64_t{kRowThreads} * kCount;
  __shared__ Sums<A> warps[kRowThreads / kWarp];
  const int64_t row = first_row + blockIdx.y;
  const int64_t begin = blockIdx.x * share;
  const int64_t end = begin + share < call.C ? begin + share : call.C;
  const T* const x = call.logits + call.first(call.logits_at, row);
  const int64_t x_step = kCount > 1 ? 1 : call.logits_at.cls;
  Sums<A> sums{minus_infinity<A>(), 0, 0, 0};
  for (int64_t c = begin + static_cast<int64_t>(threadIdx.x) * kCount; c < end;
       c += kPacks<kCount> * kStep) {
    Pack<T, kCount> packs[kPacks<kCount>];
    load_packs(x, c, end, kStep, x_step, packs);
    A values[kPacks<kCount>][kCount];
    A most = minus_infinity<A>();
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; ++p) {
      const bool is_there = c + p * kStep < end;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[p][i] = is_there ? widen(packs[p].elements[i]) : minus_infinity<A>();
        most = most < values[p][i] ? values[p][i] : most;
      }
    }
    sums.raise(most);
    const A shift = shift_of(sums.maximum);
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; ++p) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums.exps += exp(values[p][i] - shift);
      if (!call.needs_dot || c + p * kStep >= end) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A q = call.q(row, c + p * kStep + i);
        sums.q += q;
        sums.dot += q * (values[p][i] - shift);
      }
    }
  }
  sums = warp_add(sums);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();  // the first thread reads what every warp has written
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kRowThreads / kWarp; ++w) sums.add(warps[w]);
  if (parts) {
    parts[row * gridDim.x + blockIdx.x] = sums;
  } else {
    finish_row(call, row, sums);
  }
}

// parts (rows, count) → the rows' ends.
template <class T>
__global__ void finish_rows_kernel(CrossEntropyCall<T> call, const Sums<acc_t<T>>* parts,
                                   int64_t count) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= call.rows) return;
  Sums<acc_t<T>> sums = parts[row * count];
  for (int64_t i = 1; i < count; ++i) sums.add(parts[row * count + i]);
  finish_row(call, row, sums);
}

// A thread per row, where neighbouring rows lie side by side.
template <class T>
__global__ void position_kernel(CrossEntropyCall<T> call) {
  using A = acc_t<T>;
  constexpr int kAtOnce = 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPositionThreads + threadIdx.x;
  if (row >= call.rows) return;
  const T* const x = call.logits + call.first(call.logits_at, row);
  Sums<A> sums{minus_infinity<A>(), 0, 0, 0};
  for (int64_t c = 0; c < call.C; c += kAtOnce) {
    A values[kAtOnce];
    A most = minus_infinity<A>();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = c + i < call.C ? widen(x[(c + i) * call.logits_at.cls]) : minus_infinity<A>();
      if (most < values[i]) most = values[i];
    }
    sums.raise(most);
    const A shift = shift_of(sums.maximum);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (c + i >= call.C) continue;
      sums.exps += exp(values[i] - shift);
      if (call.needs_dot) {
        const A q = call.q(row, c + i);
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
  __shared__ double loss_sums[kSumThreads / kWarp], count_sums[kSumThreads / kWarp];
  double loss_sum = 0, count_sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kSumThreads) {
    if (loss) loss_sum += static_cast<double>(losses[row]);
    count_sum += static_cast<double>(counts[row]);
  }
  loss_sum = warp_sum(loss_sum);
  count_sum = warp_sum(count_sum);
  if (threadIdx.x % kWarp == 0) {
    loss_sums[threadIdx.x / kWarp] = loss_sum;
    count_sums[threadIdx.x / kWarp] = count_sum;
  }
  __syncthreads();  // the first thread reads what every warp has written
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kSumThreads / kWarp; ++w) {
    loss_sum += loss_sums[w];
    count_sum += count_sums[w];
  }
  *divisor = static_cast<A>(count_sum);
  if (loss) *loss = static_cast<A>(is_mean ? loss_sum / count_sum : loss_sum);
}

}  // namespace
}  // namespace fastnet
