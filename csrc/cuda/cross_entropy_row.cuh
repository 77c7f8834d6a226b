// What every row of cross_entropy begins and ends with, whichever kernel has it, and how threads
// share rows.
#pragma once

#include "../cross_entropy.h"
#include "common.cuh"

namespace fastnet {
namespace {

// One call, as the kernels see it. Row r is (n, d) = (r / D, r % D).
template <class T>
struct CrossEntropyCall {
  using A = acc_t<T>;
  int64_t rows, C, D;
  const T* logits;
  ClassStrides logits_at;
  const int64_t* classes;  // (N, D), or null, and then:
  const T* probabilities;
  ClassStrides target_at;
  const A* weight;  // (C) or null
  A keep, spread;   // 1 - ε, ε / C
  bool needs_dot;   // probabilities or smoothing
  int64_t ignore_index;
  A *maximum, *log_sum, *target_sum, *divisor;  // the statistics

  A* losses;  // (rows), or null where a single block sums them
  A* counts;  // (rows): what each counts in the mean; null where nobody asks
  A* loss;    // where a single block sums
  bool is_mean;

  T* gradient;  // backward
  ClassStrides gradient_at;
  const A* grad_loss;
  bool per_row;

  __device__ __forceinline__ int64_t first(const ClassStrides& at, int64_t row) const {
    return D == 1 ? row * at.outer : row / D * at.outer + row % D * at.inner;
  }
  // Of a row whose probabilities begin at `target`: null where there are none.
  __device__ __forceinline__ const T* target_of(int64_t row) const {
    return probabilities ? probabilities + first(target_at, row) : nullptr;
  }
  __device__ __forceinline__ A q(const T* target, int64_t c) const {
    const A value = target ? widen(target[c * target_at.cls]) * keep + spread : A(1);
    return weight ? value * weight[c] : value;
  }
};

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -static_cast<A>(INFINITY);
}

// What the maximum is subtracted as: exp(-inf - -inf) must not be NaN while a row may yet hold
// something finite.
template <class A>
__device__ __forceinline__ A shift_of(A maximum) {
  return maximum == minus_infinity<A>() ? A(0) : maximum;
}

// Exponentials in float are the device's own power of two, one instruction, good to 2⁻²²:
// exp(x) = 2^(x · log2 e). In double they are the library's exp. Their argument is a difference
// times kExpScale, never a difference of products: those of logits of 1e4 would be rounded to
// 1/2000, those of the largest logits overflow.
template <class A>
inline constexpr A kExpScale = std::is_same_v<A, double> ? A(1) : A(1.4426950408889634);

// exp(scaled / kExpScale). Of float, what would be subnormal is zero.
__device__ __forceinline__ float scaled_exp(float scaled) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(scaled));
  return power;
#else
  return exp2(scaled);
#endif
}
__device__ __forceinline__ double scaled_exp(double scaled) {
  return exp(scaled);
}

template <class A>
__device__ __forceinline__ A exp_of(A x) {
  return scaled_exp(x * kExpScale<A>);
}

// Σ exp(x - shift), Σ q, Σ q (x - shift) over a part of a row.
template <class A>
struct Sums {
  A maximum, exps, q, dot;

  // Makes room for a larger maximum.
  __device__ __forceinline__ void raise(A to) {
    if (!(maximum < to)) return;
    if (maximum != minus_infinity<A>()) exps *= exp_of(maximum - to);
    dot += q * (shift_of(maximum) - shift_of(to));
    maximum = to;
  }
  __device__ __forceinline__ void add(const Sums& other) {
    Sums that = other;
    raise(that.maximum);
    that.raise(maximum);
    exps += that.exps;
    q += that.q;
    dot += that.dot;
  }
};

// Over a warp, in every lane. The order is fixed.
template <class A>
__device__ __forceinline__ Sums<A> warp_add(Sums<A> sums) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Sums<A> other{__shfl_xor_sync(0xffffffffu, sums.maximum, offset),
                        __shfl_xor_sync(0xffffffffu, sums.exps, offset),
                        __shfl_xor_sync(0xffffffffu, sums.q, offset),
                        __shfl_xor_sync(0xffffffffu, sums.dot, offset)};
    // The lower lane's first on both sides, so that both come to the same bits.
    if (threadIdx.x & offset) {
      Sums<A> first = other;
      first.add(sums);
      sums = first;
    } else {
      sums.add(other);
    }
  }
  return sums;
}

template <class T>
__device__ __forceinline__ int64_t class_of(const CrossEntropyCall<T>& call, int64_t row) {
  const int64_t y = call.classes[row];
  device_assert((y >= 0 && y < call.C) || y == call.ignore_index,
                "cross_entropy: target is out of bounds");
  return y;
}

template <class A>
struct RowResult {
  A loss, count;
};

// The end of every row: its statistics, loss, and what it counts in the mean.
template <class T>
__device__ __forceinline__ RowResult<acc_t<T>> finish_row(const CrossEntropyCall<T>& call,
                                                          int64_t row, const Sums<acc_t<T>>& sums) {
  using A = acc_t<T>;
  const A log_sum = log(sums.exps);
  call.maximum[row] = sums.maximum;
  call.log_sum[row] = log_sum;
  const A smooth = sums.q * log_sum - sums.dot;
  RowResult<A> result{smooth, 1};
  if (call.classes) {
    const int64_t y = class_of(call, row);
    result = {0, 0};
    if (y != call.ignore_index) {
      const A w = call.weight ? call.weight[y] : A(1);
      const A x = widen(call.logits[call.first(call.logits_at, row) + y * call.logits_at.cls]);
      result = {w * ((sums.maximum - x) + log_sum), w};
      if (call.needs_dot) result.loss = call.keep * result.loss + call.spread * smooth;
    }
  }
  if (call.needs_dot) call.target_sum[row] = sums.q;
  if (call.losses) call.losses[row] = result.loss;
  if (call.counts) call.counts[row] = result.count;
  return result;
}

// ---------------------------------------------------------------------------------------------
// How threads share rows

// Of a block with rows of classes side by side, and of one with a position to a thread.
inline constexpr int kRowThreads = 256;
inline constexpr int kPositionThreads = 128;

// Packs of kCount elements of a row that a thread has on their way at once: with one, memory would
// wait for the arithmetic. Of half types two are sixteen elements, which is what leaves registers
// for six blocks to a multiprocessor.
template <class T, int kCount>
inline constexpr int kPacks = kCount == 1 || sizeof(T) == 4 ? 4 : 2;
// Those from c on, `step` apart, as far as they begin before `end`. An element of a row is
// x[class · x_step].
template <class T, int kCount, int kPacksThere>
__device__ __forceinline__ void load_packs(const T* x, int64_t c, int64_t end, int64_t step,
                                           int64_t x_step, Pack<T, kCount> (&packs)[kPacksThere]) {
#pragma unroll
  for (int p = 0; p < kPacksThere; ++p) {
    const int64_t at = c + p * step;
    if (at < end) packs[p] = *reinterpret_cast<const Pack<T, kCount>*>(x + at * x_step);
  }
}

// Blocks that share a multiprocessor, and its registers, at least.
template <class T>
inline constexpr int kRowBlocks = sizeof(T) == 8 ? 2 : 4;

}  // namespace
}  // namespace fastnet
