// The kernels of cross_entropy's backward, elementwise, given the rows' statistics.
#pragma once

#include "cross_entropy_row.cuh"

namespace fastnet {
namespace {

// A row's gradient is slope · softmax - offset · q, less `hit` at its class. The maximum is taken
// off by itself, which is exact near it; what is left, and log Σ, are small, and go into the
// exponent in one step.
template <class A>
struct Slopes {
  A slope, offset, hit, maximum, scaled_log_sum;
  int64_t y;

  __device__ __forceinline__ A at(A x) const {
    const A scaled = fma(x - maximum, kExpScale<A>, -scaled_log_sum);
    return slope * scaled_exp(scaled);
  }
};

template <class T>
__device__ __forceinline__ Slopes<acc_t<T>> slopes_of(const CrossEntropyCall<T>& call,
                                                      int64_t row) {
  using A = acc_t<T>;
  A scale = call.grad_loss ? call.grad_loss[call.per_row ? row : 0] : A(1);
  if (call.is_mean) scale *= 1 / *call.divisor;
  Slopes<A> slopes{0, 0, 0, call.maximum[row], call.log_sum[row] * kExpScale<A>, -1};
  if (!call.classes) {
    slopes.slope = scale * call.target_sum[row];
    slopes.offset = scale;
    return slopes;
  }
  const int64_t y = class_of(call, row);
  if (y == call.ignore_index) return slopes;
  slopes.y = y;
  slopes.hit = scale * call.keep * (call.weight ? call.weight[y] : A(1));
  slopes.offset = scale * call.spread;
  slopes.slope = call.needs_dot ? slopes.hit + slopes.offset * call.target_sum[row] : slopes.hit;
  return slopes;
}

// The gradient of a row's classes from `begin` to `end`, whose logits are from x on.
template <bool kNeedsDot, int kCount, class T>
__device__ __forceinline__ void write_gradient(const CrossEntropyCall<T>& call, int64_t row,
                                               const T* x, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T* const g = call.gradient + call.first(call.gradient_at, row);
  const int64_t x_step = kCount > 1 ? 1 : call.logits_at.cls;
  const int64_t g_step = kCount > 1 ? 1 : call.gradient_at.cls;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kCount;
  const T* const target = kNeedsDot ? call.target_of(row) : nullptr;
  const Slopes<A> slopes = slopes_of(call, row);
  for (int64_t c = begin + static_cast<int64_t>(threadIdx.x) * kCount; c < end;
       c += kPacks<T, kCount> * step) {
    Pack<T, kCount> packs[kPacks<T, kCount>];
    load_packs(x, c, end, step, x_step, packs);
#pragma unroll
    for (int p = 0; p < kPacks<T, kCount>; ++p) {
      const int64_t at = c + p * step;
      if (at >= end) break;
      A values[kCount];
      widen(packs[p], values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = slopes.at(values[i]);
      // Only one pack of a row has its class; y = -1 is in none.
      const int64_t hit_at = slopes.y - at;
      if (hit_at >= 0 && hit_at < kCount) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          values[i] -= static_cast<int>(hit_at) == i ? slopes.hit : 0;
      }
      if constexpr (kNeedsDot) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] -= slopes.offset * call.q(target, at + i);
      }
      narrow(values, &packs[p]);
      store(packs[p], g + at * g_step);
    }
  }
}

// Threads along the classes, kCount to each at a time: blockDim.y rows, a share of the classes.
template <class T, int kCount, bool kNeedsDot>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T>)
    row_gradient_kernel(CrossEntropyCall<T> call, int64_t share) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = begin + share < call.C ? begin + share : call.C;
  const T* const x = call.logits + call.first(call.logits_at, row);
  write_gradient<kNeedsDot, kCount>(call, row, x, begin, end);
}

// A thread per row, where neighbouring rows lie side by side, for a share of the classes.
template <class T>
__global__ void position_gradient_kernel(CrossEntropyCall<T> call, int64_t share) {
  using A = acc_t<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPositionThreads + threadIdx.x;
  if (row >= call.rows) return;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = begin + share < call.C ? begin + share : call.C;
  const T* const x = call.logits + call.first(call.logits_at, row);
  T* const g = call.gradient + call.first(call.gradient_at, row);
  const T* const target = call.target_of(row);
  const Slopes<A> slopes = slopes_of(call, row);
  for (int64_t c = begin; c < end; ++c) {
    A value = slopes.at(widen(x[c * call.logits_at.cls]));
    if (c == slopes.y) value -= slopes.hit;
    if (call.needs_dot) value -= slopes.offset * call.q(target, c);
    narrow(value, g + c * call.gradient_at.cls);
  }
}

}  // namespace
}  // namespace fastnet
