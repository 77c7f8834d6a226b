// cross_entropy on CUDA; the formulae stand in ../cross_entropy.h. Nothing of this has been
// measured on a card yet.
//
// Forward reads the logits once, in one of three ways:
//   few classes, side by side     a warp per row, the row in registers
//   many classes, side by side    a block per row, or several where rows are few
//   classes far apart, (N, C, d)  a thread per position, neighbours reading neighbours
// Backward is elementwise, given the rows' statistics.

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
  __device__ __forceinline__ A q(int64_t row, int64_t c) const {
    A value = 1;
    if (probabilities) {
      value = widen(probabilities[first(target_at, row) + c * target_at.cls]) * keep + spread;
    }
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

// Σ exp(x - shift), Σ q, Σ q (x - shift) over a part of a row.
template <class A>
struct Sums {
  A maximum, exps, q, dot;

  // Makes room for a larger maximum.
  __device__ __forceinline__ void raise(A to) {
    if (!(maximum < to)) return;
    if (maximum != minus_infinity<A>()) exps *= exp(maximum - to);
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
// Forward

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

inline constexpr int kRowThreads = 256;

// Packs of kCount elements of a row that a thread has on their way at once: with one, memory would
// wait for the arithmetic.
template <int kCount>
inline constexpr int kPacks = kCount > 1 ? 2 : 4;
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

// Blocks that share a multiprocessor, and its registers.
inline constexpr int kRowBlocks = 4;

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

inline constexpr int kPositionThreads = 128;

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

// ---------------------------------------------------------------------------------------------
// Backward

// A row's gradient is slope · softmax - offset · q, less `hit` at its class.
template <class A>
struct Slopes {
  A slope, offset, hit, maximum, log_sum;
  int64_t y;

  __device__ __forceinline__ A at(A x, int64_t c) const {
    const A value = slope * exp((x - maximum) - log_sum);
    return c == y ? value - hit : value;
  }
};

template <class T>
__device__ __forceinline__ Slopes<acc_t<T>> slopes_of(const CrossEntropyCall<T>& call,
                                                      int64_t row) {
  using A = acc_t<T>;
  A scale = call.grad_loss[call.per_row ? row : 0];
  if (call.is_mean) scale *= 1 / *call.divisor;
  Slopes<A> slopes{0, 0, 0, call.maximum[row], call.log_sum[row], -1};
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

// Threads along the classes, kCount to each at a time: blockDim.y rows, a share of the classes.
template <class T, int kCount>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    row_gradient_kernel(CrossEntropyCall<T> call, int64_t share) {
  using A = acc_t<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = begin + share < call.C ? begin + share : call.C;
  const T* const x = call.logits + call.first(call.logits_at, row);
  T* const g = call.gradient + call.first(call.gradient_at, row);
  const int64_t x_step = kCount > 1 ? 1 : call.logits_at.cls;
  const int64_t g_step = kCount > 1 ? 1 : call.gradient_at.cls;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kCount;
  const Slopes<A> slopes = slopes_of(call, row);
  for (int64_t c = begin + static_cast<int64_t>(threadIdx.x) * kCount; c < end;
       c += kPacks<kCount> * step) {
    Pack<T, kCount> packs[kPacks<kCount>];
    load_packs(x, c, end, step, x_step, packs);
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; ++p) {
      const int64_t at = c + p * step;
      if (at >= end) break;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        A value = slopes.at(widen(packs[p].elements[i]), at + i);
        if (call.needs_dot) value -= slopes.offset * call.q(row, at + i);
        narrow(value, &packs[p].elements[i]);
      }
      *reinterpret_cast<Pack<T, kCount>*>(g + at * g_step) = packs[p];
    }
  }
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
  const Slopes<A> slopes = slopes_of(call, row);
  for (int64_t c = begin; c < end; ++c) {
    A value = slopes.at(widen(x[c * call.logits_at.cls]), c);
    if (call.needs_dot) value -= slopes.offset * call.q(row, c);
    narrow(value, g + c * call.gradient_at.cls);
  }
}

// ---------------------------------------------------------------------------------------------
// Launchers

// Rows for which the card is full with one block each; below, several share one.
inline constexpr int64_t kFullRows = 256;
inline constexpr int64_t kWarpRowClasses = 1024;
// Logits up to which one block, and so one launch, is quicker than a full card and a second launch.
inline constexpr int64_t kAloneLogits = 16'384;

// Whether kCount elements can be moved together everywhere in the rows.
template <class T>
bool is_packed(const void* pointer, const ClassStrides& at, int64_t C, int64_t D) {
  constexpr int64_t kCount = kVectorBytes / sizeof(T);
  return at.cls == 1 && C % kCount == 0 && at.outer % kCount == 0 &&
         (D == 1 || at.inner % kCount == 0) &&
         reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Classes per block, a multiple of `unit`, so that rows times shares fill the card.
int64_t share_of(int64_t C, int64_t rows, int64_t unit, int64_t full) {
  const int64_t blocks = std::max<int64_t>(1, full / std::max<int64_t>(1, rows));
  const int64_t share = (C + blocks - 1) / blocks;
  return (share + unit - 1) / unit * unit;
}

template <class T, int kPerLane = 1>
void launch_warp_rows(const CrossEntropyCall<T>& call, cudaStream_t stream) {
  if constexpr (kPerLane * kWarp < kWarpRowClasses) {
    if (kPerLane * kWarp < call.C) return launch_warp_rows<T, 2 * kPerLane>(call, stream);
  }
  const int warps = call.loss ? kRowWarpsAlone<T, kPerLane> : kRowWarps;
  launch(warp_row_kernel<T, kPerLane>, dim3(call.loss ? 1 : blocks_for(call.rows, warps)),
         dim3(kWarp, warps), 0, stream, call);
}

// The tensors of a call, kept alive while the kernels are launched, and the call itself.
template <class T>
struct Operands {
  using D = device_t<T>;
  using A = acc_t<D>;
  Tensor logits, target;
  std::optional<Tensor> weight;
  CrossEntropyCall<D> call{};

  Operands(const CrossEntropyShape& shape, const Tensor& given_logits, const Tensor& given_target,
           const std::optional<Tensor>& given_weight, const Tensor& statistics, int64_t reduction,
           int64_t ignore_index, double label_smoothing)
      : logits(with_class_strides(given_logits)),
        target(shape.has_probabilities ? with_class_strides(given_target) : dense(given_target)) {
    call.rows = shape.rows();
    call.C = shape.C;
    call.D = shape.D;
    call.logits = data<T>(logits);
    call.logits_at = *class_strides(logits);
    if (shape.has_probabilities) {
      call.probabilities = data<T>(target);
      call.target_at = *class_strides(target);
    } else {
      call.classes = static_cast<const int64_t*>(target.const_data_ptr());
    }
    if (given_weight) {
      weight = dense(*given_weight);
      call.weight = static_cast<const A*>(weight->const_data_ptr());
    }
    call.keep = static_cast<A>(1 - label_smoothing);
    call.spread = static_cast<A>(label_smoothing / static_cast<double>(shape.C));
    call.needs_dot = shape.needs_dot;
    call.ignore_index = ignore_index;
    call.is_mean = static_cast<Reduction>(reduction) == Reduction::mean;
    call.maximum = static_cast<A*>(statistics.mutable_data_ptr());
    call.log_sum = call.maximum + shape.rows();
    call.target_sum = call.log_sum + shape.rows();
    call.divisor = call.maximum + shape.statistics() - 1;
  }
};

// ---------------------------------------------------------------------------------------------
// Host functions

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& weight,
                                                 int64_t reduction, int64_t ignore_index,
                                                 double label_smoothing) {
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, weight, reduction, label_smoothing);
  const OnDeviceOf on_device(logits);
  const ScalarType wide = accumulate_type(logits);
  const bool per_row = static_cast<Reduction>(reduction) == Reduction::none;
  const int64_t rows = shape.rows();
  const Tensor loss = allocate_loss(logits, reduction);
  const Tensor statistics = allocate(logits, std::array{shape.statistics()}, wide);

  dispatch_float_and_half("cross_entropy", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using E = device_t<T>;
    using A = acc_t<E>;
    const cudaStream_t stream = on_device.stream();
    Operands<T> operands(shape, logits, target, weight, statistics, reduction, ignore_index,
                         label_smoothing);
    auto& call = operands.call;
    A* const result = static_cast<A*>(loss.mutable_data_ptr());
    const bool by_position = shape.D > 1 && call.logits_at.cls != 1;
    const bool by_warp = !by_position && shape.C <= kWarpRowClasses;

    if (by_warp && !per_row && rows * shape.C <= kAloneLogits) {
      call.loss = result;
      launch_warp_rows(call, stream);
      return;
    }
    // (2, rows): losses, where they are not the result, and counts
    const Tensor scratch = allocate(logits, std::array{2 * rows}, wide);
    A* const scratch_data = static_cast<A*>(scratch.mutable_data_ptr());
    call.losses = per_row ? result : scratch_data;
    call.counts = scratch_data + rows;
    if (rows == 0) {
      // Nothing to launch for; the sum below writes 0, or 0 / 0.
    } else if (by_position) {
      launch(position_kernel<E>, dim3(blocks_for(rows, kPositionThreads)), dim3(kPositionThreads),
             0, stream, call);
    } else if (by_warp) {
      launch_warp_rows(call, stream);
    } else {
      constexpr int kCount = kVectorBytes / sizeof(E);
      const bool packed = is_packed<E>(call.logits, call.logits_at, shape.C, shape.D);
      const int64_t share = share_of(shape.C, rows, int64_t{kRowThreads} * kCount, kFullRows);
      const int64_t shares = (shape.C + share - 1) / share;
      Tensor parts;
      Sums<A>* part = nullptr;
      if (shares > 1) {
        parts = allocate(logits, std::array{4 * rows * shares}, wide);
        part = static_cast<Sums<A>*>(parts.mutable_data_ptr());
      }
      // The grid's second dimension holds 65,535 rows.
      constexpr int64_t kGridRows = 65'535;
      for (int64_t first = 0; first < rows; first += kGridRows) {
        const auto count = static_cast<unsigned>(std::min(kGridRows, rows - first));
        const dim3 grid(static_cast<unsigned>(shares), count);
        if (packed) {
          launch(block_row_kernel<E, kCount>, grid, dim3(kRowThreads), 0, stream, call, part, share,
                 first);
        } else {
          launch(block_row_kernel<E, 1>, grid, dim3(kRowThreads), 0, stream, call, part, share,
                 first);
        }
      }
      if (part) {
        launch(finish_rows_kernel<E>, dim3(blocks_for(rows, 128)), dim3(128), 0, stream, call, part,
               shares);
      }
    }
    launch(sum_losses_kernel<A>, dim3(1), dim3(kSumThreads), 0, stream, call.losses, call.counts,
           rows, per_row ? nullptr : result, call.divisor, call.is_mean);
  });
  return {loss, statistics};
}

void cross_entropy_backward_out(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& weight, const Tensor& statistics,
                                int64_t reduction, int64_t ignore_index, double label_smoothing,
                                Tensor gradient) {
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, weight, reduction, label_smoothing);
  check_cross_entropy_backward(shape, grad_loss, logits, statistics, reduction, gradient);
  const OnDeviceOf on_device(logits);
  const int64_t rows = shape.rows();
  if (rows == 0) return;

  dispatch_float_and_half("cross_entropy_backward", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using E = device_t<T>;
    using A = acc_t<E>;
    const cudaStream_t stream = on_device.stream();
    const Tensor stats = dense(statistics), g = dense(grad_loss);
    // Where the gradient's own layout has no class strides, it is made in a dense one.
    const bool has_strides = class_strides(gradient).has_value();
    const Tensor written = has_strides ? gradient : allocate(logits, logits.sizes());
    Operands<T> operands(shape, logits, target, weight, stats, reduction, ignore_index,
                         label_smoothing);
    auto& call = operands.call;
    call.gradient = mutable_data<T>(written);
    call.gradient_at = *class_strides(written);
    call.grad_loss = static_cast<const A*>(g.const_data_ptr());
    call.per_row = static_cast<Reduction>(reduction) == Reduction::none;

    constexpr int64_t kFullBlocks = 4 * kFullRows;
    if (shape.D > 1 && call.logits_at.cls != 1) {
      const unsigned blocks = blocks_for(rows, kPositionThreads);
      const int64_t share = share_of(shape.C, blocks, 16, kFullBlocks);
      launch(position_gradient_kernel<E>, dim3(blocks, blocks_for(shape.C, share)),
             dim3(kPositionThreads), 0, stream, call, share);
    } else {
      constexpr int kCount = kVectorBytes / sizeof(E);
      const bool packed = is_packed<E>(call.logits, call.logits_at, shape.C, shape.D) &&
                          is_packed<E>(call.gradient, call.gradient_at, shape.C, shape.D);
      const int64_t steps = packed ? shape.C / kCount : shape.C;  // a thread's, per row
      int width = kWarp;
      while (width < kRowThreads && width < steps) width *= 2;
      const int height = kRowThreads / width;
      const unsigned blocks = blocks_for(rows, height);
      const int64_t unit = static_cast<int64_t>(width) * (packed ? kCount : 1);
      const int64_t share = share_of(shape.C, blocks, 4 * unit, kFullBlocks);
      const dim3 grid(blocks, blocks_for(shape.C, share)), block(width, height);
      if (packed) {
        launch(row_gradient_kernel<E, kCount>, grid, block, 0, stream, call, share);
      } else {
        launch(row_gradient_kernel<E, 1>, grid, block, 0, stream, call, share);
      }
    }
    if (!has_strides) {
      Tensor to = gradient;
      torch::stable::copy_(to, written);
    }
  });
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& weight, const Tensor& statistics,
                              int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const Tensor gradient = allocate_like(logits);
  cross_entropy_backward_out(grad_loss, logits, target, weight, statistics, reduction, ignore_index,
                             label_smoothing, gradient);
  return gradient;
}

}  // namespace

FASTNET_CUDA_LIBRARY(library) {
  library.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  library.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  library.impl("cross_entropy_backward.out", TORCH_BOX(&cross_entropy_backward_out));
}

}  // namespace fastnet
