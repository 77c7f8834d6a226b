// The kernels that make cross_entropy's gradient along with the loss: every row comes to shared
// memory, is summed there, and turned into its gradient there. So memory gives each logit once, not
// once in either pass.
#pragma once

#include "cross_entropy_backward_kernels.cuh"
#include "cross_entropy_forward_kernels.cuh"

namespace fastnet {
namespace {

// Blocks, and so rows, that share a multiprocessor: while one waits for its row, others compute.
inline constexpr int kWholeRows = 3;

// A block per row of class indices without smoothing, packs of kCount side by side everywhere.
// Shared memory: a row's logits. Each thread brings, sums and turns the same packs, so that for
// these none waits for another.
template <class T, int kCount>
__global__ void __launch_bounds__(kRowThreads, kWholeRows)
    row_with_gradient_kernel(CrossEntropyCall<T> call) {
  using A = acc_t<T>;
  FASTNET_DYNAMIC_SHARED(T, x);
  __shared__ Sums<A> warps[kRowThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* const from = call.logits + call.first(call.logits_at, row);
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kCount; c < call.C;
       c += int64_t{kRowThreads} * kCount) {
    copy_async(x + c, from + c);
  }
  wait_for_copies();
  const Sums<A> sums =
      block_sums<false, kCount>(call, warps, x, static_cast<const T*>(nullptr), 0, call.C);
  if (threadIdx.x == 0) finish_row(call, row, sums);
  __syncthreads();  // the row's statistics are there
  write_gradient<false, kCount>(call, row, x, 0, call.C);
}

// What the rows count in the mean, in one block: the order is fixed.
template <class T>
__global__ void divisor_kernel(CrossEntropyCall<T> call) {
  using A = acc_t<T>;
  __shared__ double of_warps[kSumThreads / kWarp][1];
  double sums[1] = {};
  for (int64_t row = threadIdx.x; row < call.rows; row += kSumThreads) {
    const int64_t y = class_of(call, row);
    if (y != call.ignore_index) sums[0] += static_cast<double>(call.weight ? call.weight[y] : A(1));
  }
  sums[0] = warp_sum(sums[0]);
  sum_warps(sums, of_warps, static_cast<int>(threadIdx.x) / kWarp, kSumThreads / kWarp);
  if (threadIdx.x == 0) *call.divisor = static_cast<A>(sums[0]);
}

// gradient (rows, C), dense, times a factor in memory, `count` packs. Of 1, which it nearly always
// is, nothing is read. Where the factor is infinite or NaN it is as in torch: rows that are ignored
// stay zeros, and of others the class itself, a difference of infinities, is NaN.
template <class T, int kCount>
__global__ void __launch_bounds__(kRowThreads)
    scale_gradient_kernel(T* gradient, const acc_t<T>* factor_at, const int64_t* classes,
                          int64_t ignore_index, int64_t C, int64_t count) {
  using A = acc_t<T>;
  const A factor = *factor_at;
  if (factor == A(1)) return;
  const bool is_finite = factor - factor == A(0);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kRowThreads) {
    int64_t y = -1;  // from the pack's first class on
    if (!is_finite) {
      y = classes[i * kCount / C];
      if (y == ignore_index) continue;
      y -= i * kCount % C;
    }
    T* const at = gradient + i * kCount;
    Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(at);
    A values[kCount];
    widen(pack, values);
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = k == y ? A(NAN) : values[k] * factor;
    narrow(values, &pack);
    store(pack, at);
  }
}

}  // namespace
}  // namespace fastnet
