// conv_relu_pool of few input channels: a convolution of our own, and its weight's gradient.
#pragma once

#include "conv_relu_pool_window.cuh"

namespace fastnet {
namespace {

// One call, as the kernels see it.
template <class T>
struct ConvReluPoolCall {
  int64_t N, C, H, W, K, P, Q;
  int64_t pad_y, pad_x;
  const T* input;
  Strides4 input_at;
  const T* weight;
  Strides4 weight_at;
  const T* bias;  // or null
  T* output;
  uint8_t* codes;
  Strides4 output_at;  // of the codes, too
};

// An element of the padded input. Of the padding the first element is read in its stead: a load
// that hangs on no condition is on its way while others are asked for.
template <class Call>
__device__ __forceinline__ auto padded_input(const Call& call, int64_t n, int64_t c, int64_t y,
                                             int64_t x) {
  y -= call.pad_y;
  x -= call.pad_x;
  using A = decltype(widen(*call.input));
  const bool is_there = y >= 0 && y < call.H && x >= 0 && x < call.W;
  const int64_t at =
      n * call.input_at.n + c * call.input_at.c + y * call.input_at.y + x * call.input_at.x;
  const A value = widen(call.input[is_there ? at : 0]);
  return is_there ? value : A(0);
}

// ---------------------------------------------------------------------------------------------
// The convolution of our own. A block has 16 x 8 windows of an image, one a thread, for kFilters
// filters, then the next ones, `groups` of them; input and weights go through shared memory,
// kChannels channels at a time. An input of no more stays there for all groups.

inline constexpr int kWindowsX = 16, kWindowsY = 8, kFilters = 8, kChannels = 4;

template <class T, int kKernel>
__global__ void __launch_bounds__(kWindowsX* kWindowsY)
    conv_relu_pool_forward_kernel(ConvReluPoolCall<T> call, unsigned tiles_x, unsigned tiles_y,
                                  unsigned groups) {
  using A = acc_t<T>;
  constexpr int kRows = 2 * kWindowsY + kKernel - 1, kColumns = 2 * kWindowsX + kKernel - 1;
  constexpr int kThreads = kWindowsX * kWindowsY, kTaps = kKernel * kKernel;
  constexpr int kPatch = kKernel + 1;
  __shared__ A input[kChannels][kRows][kColumns];
  __shared__ Pack<A, kFilters> weights[kChannels][kTaps];
  __shared__ int met_infinity;  // or NaN, among the weights: not to be multiplied by the padding
  const int thread = threadIdx.x, window_x = thread % kWindowsX, window_y = thread / kWindowsX;
  const int64_t n = blockIdx.x / (tiles_x * tiles_y);
  const int64_t tile = blockIdx.x % (tiles_x * tiles_y);
  const int64_t p_first = tile / tiles_x * kWindowsY, q_first = tile % tiles_x * kWindowsX;
  for (unsigned group = 0; group < groups; ++group) {
    const int64_t k_first = (static_cast<int64_t>(blockIdx.y) * groups + group) * kFilters;
    if (k_first >= call.K) break;
    if (thread == 0) met_infinity = 0;
    __syncthreads();  // before anybody may set it
    A sum[kFilters][4];
#pragma unroll
    for (int k = 0; k < kFilters; ++k) {
      const A start = call.bias && k_first + k < call.K ? widen(call.bias[k_first + k]) : A(0);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[k][i] = start;
    }
    for (int64_t c_first = 0; c_first < call.C; c_first += kChannels) {
      const int channels =
          static_cast<int>(call.C - c_first < kChannels ? call.C - c_first : kChannels);
      const int elements = group == 0 || call.C > kChannels ? channels * kRows * kColumns : 0;
#pragma unroll 4
      for (int i = thread; i < elements; i += kThreads) {
        const int x = i % kColumns, y = i / kColumns % kRows, c = i / (kColumns * kRows);
        input[c][y][x] = padded_input(call, n, c_first + c, 2 * p_first + y, 2 * q_first + x);
      }
      for (int i = thread; i < channels * kFilters * kTaps; i += kThreads) {
        const int tap = i % kTaps, k = i / kTaps % kFilters, c = i / (kTaps * kFilters);
        const A w = k_first + k < call.K ? widen(call.weight[(k_first + k) * call.weight_at.n +
                                                             (c_first + c) * call.weight_at.c +
                                                             tap / kKernel * call.weight_at.y +
                                                             tap % kKernel * call.weight_at.x])
                                         : A(0);
        weights[c][tap].elements[k] = w;
        if (w - w != A(0)) atomicMax(&met_infinity, 1);
      }
      __syncthreads();  // what others have loaded
      if (met_infinity) {
        const int64_t y = 2 * (p_first + window_y) - call.pad_y;
        const int64_t x = 2 * (q_first + window_x) - call.pad_x;
        for (int i = 0; i < channels * kTaps * 4; ++i) {
          const int position = i % 4, tap = i / 4 % kTaps, c = i / (4 * kTaps);
          const int dy = tap / kKernel + position / 2, dx = tap % kKernel + position % 2;
          if (y + dy < 0 || y + dy >= call.H || x + dx < 0 || x + dx >= call.W) continue;
          const A value = input[c][2 * window_y + dy][2 * window_x + dx];
#pragma unroll
          for (int k = 0; k < kFilters; ++k) {
            const A product = weights[c][tap].elements[k] * value;
            if (position == 0) sum[k][0] += product;  // registers have no address
            if (position == 1) sum[k][1] += product;
            if (position == 2) sum[k][2] += product;
            if (position == 3) sum[k][3] += product;
          }
        }
        __syncthreads();  // as below
        continue;
      }
      for (int c = 0; c < channels; ++c) {
        A patch[kPatch][kPatch];
#pragma unroll
        for (int y = 0; y < kPatch; ++y) {
#pragma unroll
          for (int x = 0; x < kPatch; ++x)
            patch[y][x] = input[c][2 * window_y + y][2 * window_x + x];
        }
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const Pack<A, kFilters> w = weights[c][tap];
#pragma unroll
          for (int k = 0; k < kFilters; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[k][i] += w.elements[k] * patch[tap / kKernel + i / 2][tap % kKernel + i % 2];
            }
          }
        }
      }
      __syncthreads();  // before the next channels take their place
    }
    const int64_t p = p_first + window_y, q = q_first + window_x;
#pragma unroll
    for (int k = 0; k < kFilters; ++k) {
      if (k_first + k >= call.K || p >= call.P || q >= call.Q) break;
      const int64_t at = n * call.output_at.n + (k_first + k) * call.output_at.c +
                         p * call.output_at.y + q * call.output_at.x;
      write_window<T, A>(sum[k], call.output + at, call.codes + at);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The weight's gradient of our own, for few channels of the input. A warp has a window at a time,
// with a filter to a lane: what they read of the input lies within a patch, so that shared memory
// gives it at once. Each block sums some tiles of windows, and a second kernel the blocks' sums.

inline constexpr int kGradientFilters = kWarp, kGradientWarps = 8, kTile = kWindowsX * kWindowsY;
inline constexpr int kGradientBlocks = 512, kSlices = 16;

template <class T>
struct WeightGradientCall {
  int64_t C, H, W, K, P, Q, z_height, z_width, pad_y, pad_x;
  const T* input;
  Strides4 input_at;
  const T* grad_output;
  Strides4 grad_output_at;
  const uint8_t* codes;
  Strides4 codes_at;
  unsigned tiles_x, tiles_y, tiles;  // of an image, and of all
  float* sums;                       // (blocks, C · taps + 1, K), the bias's behind the weight's
};

template <class T, int kKernel, int kChannels>
__global__ void __launch_bounds__(kWarp* kGradientWarps, 3)
    weight_gradient_kernel(WeightGradientCall<T> call) {
  constexpr int kRows = 2 * kWindowsY + kKernel - 1, kColumns = 2 * kWindowsX + kKernel - 1;
  constexpr int kThreads = kWarp * kGradientWarps, kTaps = kKernel * kKernel;
  constexpr int kSums = kChannels * kTaps + 1;
  struct Loaded {
    float input[kChannels][kRows][kColumns];
    float grads[kGradientFilters][kTile + 1];  // one more, so that lanes meet in no bank
    uint8_t codes[kGradientFilters][kTile + 4];
  };
  union Shared {
    Loaded loaded;
    float sums[kGradientWarps][kSums][kGradientFilters];
  };
  __shared__ Shared shared;
  __shared__ int met_infinity;  // or NaN: torch multiplies them by the gradient's zeros, too
  Loaded& loaded = shared.loaded;
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * kWarp + lane;
  const int64_t k_first = static_cast<int64_t>(blockIdx.y) * kGradientFilters;
  const int64_t c_first = static_cast<int64_t>(blockIdx.z) * kChannels;
  float sum[kSums] = {};

  for (unsigned tile = blockIdx.x; tile < call.tiles; tile += gridDim.x) {
    const int64_t n = tile / (call.tiles_x * call.tiles_y);
    const int64_t p_first = static_cast<int64_t>(tile / call.tiles_x % call.tiles_y) * kWindowsY;
    const int64_t q_first = static_cast<int64_t>(tile % call.tiles_x) * kWindowsX;
    __syncthreads();  // until nobody reads the tile before
    if (thread == 0) met_infinity = 0;
    __syncthreads();  // before anybody may set it
    bool is_finite = true;
#pragma unroll 4
    for (int i = thread; i < kChannels * kRows * kColumns; i += kThreads) {
      const int x = i % kColumns, y = i / kColumns % kRows, c = i / (kColumns * kRows);
      const float value = padded_input(call, n, c_first + c, 2 * p_first + y, 2 * q_first + x);
      is_finite = is_finite && value - value == 0;
      loaded.input[c][y][x] = value;
    }
    // Neighbouring threads have neighbouring windows, or filters where those lie side by side. Some
    // loads of each are on their way before the first is waited for.
    const bool by_filter = call.grad_output_at.c == 1;
    constexpr int kAtOnce = 4, kTurn = kAtOnce * kThreads;
    static_assert(kGradientFilters * kTile % kTurn == 0);
    for (int first = thread; first < kGradientFilters * kTile + thread; first += kTurn) {
      uint8_t codes[kAtOnce];
      float grads[kAtOnce];
      const auto filter_of = [&](int i) { return by_filter ? i % kGradientFilters : i / kTile; };
      const auto window_of = [&](int i) { return by_filter ? i / kGradientFilters : i % kTile; };
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int k = filter_of(first + j * kThreads), window = window_of(first + j * kThreads);
        const int64_t p = p_first + window / kWindowsX, q = q_first + window % kWindowsX;
        const bool is_there = k_first + k < call.K && p < call.P && q < call.Q;
        const auto offset = [&](const Strides4& at) {  // where there is none, of the first element
          return is_there ? n * at.n + (k_first + k) * at.c + p * at.y + q * at.x : 0;
        };
        const uint8_t code = call.codes[offset(call.codes_at)];
        codes[j] = is_there ? code : kDead;
        grads[j] = widen(call.grad_output[offset(call.grad_output_at)]);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int k = filter_of(first + j * kThreads), window = window_of(first + j * kThreads);
        const float grad = codes[j] < kDead ? grads[j] : 0;
        is_finite = is_finite && grad - grad == 0;
        loaded.codes[k][window] = codes[j];
        loaded.grads[k][window] = grad;
      }
    }
    if (!is_finite) atomicMax(&met_infinity, 1);
    __syncthreads();  // what others have loaded

    for (int window = warp; window < kTile; window += kGradientWarps) {
      const int window_y = window / kWindowsX, window_x = window % kWindowsX;
      const int code = loaded.codes[lane][window];
      const float grad = loaded.grads[lane][window];
      if (met_infinity) {
        for (int i = 0; i < 4; ++i) {
          const int64_t y = 2 * (p_first + window_y) + i / 2, x = 2 * (q_first + window_x) + i % 2;
          if (y >= call.z_height || x >= call.z_width) continue;
          const float value = code == i ? grad : 0;
#pragma unroll
          for (int j = 0; j < kSums - 1; ++j) {
            const int tap = j % kTaps, dy = tap / kKernel, dx = tap % kKernel;
            const int64_t from_y = y + dy - call.pad_y, from_x = x + dx - call.pad_x;
            if (from_y < 0 || from_y >= call.H || from_x < 0 || from_x >= call.W) continue;
            sum[j] += value *
                      loaded.input[j / kTaps][2 * window_y + i / 2 + dy][2 * window_x + i % 2 + dx];
          }
          sum[kSums - 1] += value;
        }
      } else if (code < kDead) {
        const int y = 2 * window_y + code / 2, x = 2 * window_x + code % 2;
#pragma unroll
        for (int j = 0; j < kSums - 1; ++j) {
          const int tap = j % kTaps;
          sum[j] += grad * loaded.input[j / kTaps][y + tap / kKernel][x + tap % kKernel];
        }
        sum[kSums - 1] += grad;
      }
    }
  }

  __syncthreads();  // until nobody reads the last tile
#pragma unroll
  for (int j = 0; j < kSums; ++j) shared.sums[warp][j][lane] = sum[j];
  __syncthreads();  // what the other warps have summed
  for (int i = thread; i < kSums * kGradientFilters; i += kThreads) {
    const int j = i / kGradientFilters, k = i % kGradientFilters;
    if (k_first + k >= call.K || (j == kSums - 1 && blockIdx.z > 0)) continue;
    float total = 0;
    for (int w = 0; w < kGradientWarps; ++w) total += shared.sums[w][j][k];
    const int64_t row = j == kSums - 1 ? call.C * kTaps : c_first * kTaps + j;
    call.sums[(blockIdx.x * (call.C * kTaps + 1) + row) * call.K + k_first + k] = total;
  }
}

// The blocks' sums to grad_weight and grad_bias, each of which may be null. A block has kWarp of
// them, each in kSlices slices.
template <class T>
__global__ void collect_gradient_kernel(const float* sums, unsigned blocks, int64_t C, int64_t K,
                                        int kernel, T* grad_weight, Strides4 grad_weight_at,
                                        T* grad_bias) {
  __shared__ float slices[kSlices][kWarp];
  const int64_t count = (C * kernel * kernel + 1) * K;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0;
  if (index < count) {
#pragma unroll 4
    for (unsigned b = threadIdx.y; b < blocks; b += kSlices) sum += sums[b * count + index];
  }
  slices[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // the first warp reads what the others have summed
  if (threadIdx.y != 0 || index >= count) return;
  for (int s = 1; s < kSlices; ++s) sum += slices[s][threadIdx.x];
  const int64_t row = index / K, k = index % K;
  const int64_t tap = row % (kernel * kernel), c = row / (kernel * kernel);
  if (c == C) {
    if (grad_bias) narrow(sum, grad_bias + k);
  } else if (grad_weight) {
    narrow(sum, grad_weight + k * grad_weight_at.n + c * grad_weight_at.c +
                    tap / kernel * grad_weight_at.y + tap % kernel * grad_weight_at.x);
  }
}

}  // namespace
}  // namespace fastnet
