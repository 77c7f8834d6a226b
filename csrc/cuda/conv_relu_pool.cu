// conv_relu_pool on CUDA; the op's definition stands in ../conv_relu_pool.h. The speed of nothing
// of this has been measured on a card yet.
//
// Forward: where input channels are few, a convolution of our own that keeps the sums of whole
// windows in registers; else the library's convolution, and one pass for bias, ReLU, maximum and
// codes. Backward: where channels are few and the input's gradient is not wanted, as in a network's
// first layer, the weight's from the pooled gradient and the codes alone; else the gradient
// expanded to the convolution's output, for the library's backward. Sums are added in an order that
// the shape alone decides.

#include "../conv_relu_pool.h"
#include "common.cuh"
#include "library_calls.cuh"

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

// An element of the padded input.
template <class Call>
__device__ __forceinline__ auto padded_input(const Call& call, int64_t n, int64_t c, int64_t y,
                                             int64_t x) {
  y -= call.pad_y;
  x -= call.pad_x;
  using A = decltype(widen(*call.input));
  if (y < 0 || y >= call.H || x < 0 || x >= call.W) return A(0);
  return widen(call.input[n * call.input_at.n + c * call.input_at.c + y * call.input_at.y +
                          x * call.input_at.x]);
}

// The four outputs of a window, in the order 2·dy + dx, to the pooled one and its code.
template <class T, class A>
__device__ __forceinline__ void write_window(const A* y, T* output, uint8_t* code) {
  A most = y[0];
  int winner = 0;
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    if (y[i] > most || y[i] != y[i]) {
      most = y[i];
      winner = i;
    }
  }
  const bool dead = most <= A(0);
  narrow(dead ? A(0) : most, output);
  *code = static_cast<uint8_t>(dead ? kDead : winner);
}

// ---------------------------------------------------------------------------------------------
// The convolution of our own. A block has 16 x 8 windows of an image, one a thread, for kFilters
// filters; input and weights go through shared memory, kChannels channels at a time.

inline constexpr int kWindowsX = 16, kWindowsY = 8, kFilters = 8, kChannels = 4;

template <class T, int kKernel>
__global__ void __launch_bounds__(kWindowsX* kWindowsY)
    conv_relu_pool_forward_kernel(ConvReluPoolCall<T> call, unsigned tiles_x, unsigned tiles_y) {
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
  const int64_t k_first = static_cast<int64_t>(blockIdx.y) * kFilters;

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
    for (int i = thread; i < channels * kRows * kColumns; i += kThreads) {
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
        for (int x = 0; x < kPatch; ++x) patch[y][x] = input[c][2 * window_y + y][2 * window_x + x];
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
  if (p >= call.P || q >= call.Q) return;
#pragma unroll
  for (int k = 0; k < kFilters; ++k) {
    if (k_first + k >= call.K) break;
    const int64_t at = n * call.output_at.n + (k_first + k) * call.output_at.c +
                       p * call.output_at.y + q * call.output_at.x;
    write_window<T, A>(sum[k], call.output + at, call.codes + at);
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
__global__ void __launch_bounds__(kWarp* kGradientWarps)
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
    for (int i = thread; i < kChannels * kRows * kColumns; i += kThreads) {
      const int x = i % kColumns, y = i / kColumns % kRows, c = i / (kColumns * kRows);
      const float value = padded_input(call, n, c_first + c, 2 * p_first + y, 2 * q_first + x);
      is_finite = is_finite && value - value == 0;
      loaded.input[c][y][x] = value;
    }
    for (int i = thread; i < kGradientFilters * kTile; i += kThreads) {
      // Neighbouring threads have neighbouring windows, or filters where those lie side by side.
      const bool by_filter = call.grad_output_at.c == 1;
      const int k = by_filter ? i % kGradientFilters : i / kTile;
      const int window = by_filter ? i / kGradientFilters : i % kTile;
      const int64_t p = p_first + window / kWindowsX, q = q_first + window % kWindowsX;
      uint8_t code = kDead;
      float grad = 0;
      if (k_first + k < call.K && p < call.P && q < call.Q) {
        const auto offset = [&](const Strides4& at) {
          return n * at.n + (k_first + k) * at.c + p * at.y + q * at.x;
        };
        code = call.codes[offset(call.codes_at)];
        if (code < kDead) grad = widen(call.grad_output[offset(call.grad_output_at)]);
      }
      is_finite = is_finite && grad - grad == 0;
      loaded.codes[k][window] = code;
      loaded.grads[k][window] = grad;
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

// ---------------------------------------------------------------------------------------------
// The passes around the library's convolution. A thread has a window, of kCount filters where these
// lie side by side; windows are in the order of the output's memory. A count of windows that fits
// 32 bits is an unsigned one, which divides in a fifth of the time.

template <class Index>
struct Position {
  Index n, k, y, x;
};

template <class Index>
__device__ __forceinline__ Position<Index> position_of(Index index, Index K, Index height,
                                                       Index width, bool channels_last) {
  if (channels_last) {
    const Index pixel = index / K;
    return {pixel / (height * width), index % K, pixel / width % height, pixel % width};
  }
  const Index row = index / width, image = row / height;
  return {image / K, image % K, row % height, index % width};
}

template <class T, class Index, int kCount>
__global__ void relu_pool_kernel(const T* z, Strides4 z_at, const T* bias, T* output,
                                 uint8_t* codes, Index K, Index P, Index Q, bool channels_last,
                                 Index count) {
  using A = acc_t<T>;
  const Index index = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const Position<Index> at = position_of<Index>(index, K / kCount, P, Q, channels_last);
  const int64_t k = static_cast<int64_t>(at.k) * kCount;
  const T* const from = z + at.n * z_at.n + k * z_at.c + 2 * at.y * z_at.y + 2 * at.x * z_at.x;
  Pack<T, kCount> window[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    window[i] = *reinterpret_cast<const Pack<T, kCount>*>(from + i / 2 * z_at.y + i % 2 * z_at.x);
  }
  Pack<T, kCount> most;
  Pack<uint8_t, kCount> winners;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const A shift = bias ? widen(bias[k + c]) : A(0);
    A y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Rounded before they are compared, as by torch: what is equal then is equal here.
      narrow(widen(window[i].elements[c]) + shift, &window[i].elements[c]);
      y[i] = widen(window[i].elements[c]);
    }
    write_window<T, A>(y, &most.elements[c], &winners.elements[c]);
  }
  const int64_t to = static_cast<int64_t>(index) * kCount;
  *reinterpret_cast<Pack<T, kCount>*>(output + to) = most;
  *reinterpret_cast<Pack<uint8_t, kCount>*>(codes + to) = winners;
}

// Over P x Q windows as above, but of all of grad_z, whose last row and column may be in none.
template <class T, class Index, int kCount>
__global__ void expand_kernel(const T* grad_output, Strides4 grad_output_at, const uint8_t* codes,
                              Strides4 codes_at, T* grad_z, Strides4 grad_z_at, Index K, Index P,
                              Index Q, Index height, Index width, bool channels_last, Index count) {
  const Index index = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const Position<Index> at =
      position_of<Index>(index, K / kCount, (height + 1) / 2, (width + 1) / 2, channels_last);
  const int64_t k = static_cast<int64_t>(at.k) * kCount;
  Pack<T, kCount> grads;
  Pack<uint8_t, kCount> winners;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    narrow(acc_t<T>(0), &grads.elements[c]);
    winners.elements[c] = kDead;
  }
  if (at.y < P && at.x < Q) {
    winners = *reinterpret_cast<const Pack<uint8_t, kCount>*>(
        codes + at.n * codes_at.n + k * codes_at.c + at.y * codes_at.y + at.x * codes_at.x);
    const T* const from = grad_output + at.n * grad_output_at.n + k * grad_output_at.c +
                          at.y * grad_output_at.y + at.x * grad_output_at.x;
#pragma unroll
    for (int c = 0; c < kCount; ++c) grads.elements[c] = from[c * grad_output_at.c];
  }
  T* const to = grad_z + at.n * grad_z_at.n + k * grad_z_at.c + 2 * at.y * grad_z_at.y +
                2 * at.x * grad_z_at.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (2 * at.y + i / 2 >= height || 2 * at.x + i % 2 >= width) continue;
    Pack<T, kCount> expanded;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (winners.elements[c] == i) {
        expanded.elements[c] = grads.elements[c];
      } else {
        narrow(acc_t<T>(0), &expanded.elements[c]);
      }
    }
    *reinterpret_cast<Pack<T, kCount>*>(to + i / 2 * grad_z_at.y + i % 2 * grad_z_at.x) = expanded;
  }
}

// ---------------------------------------------------------------------------------------------

inline constexpr int kThreads = 256;
// Input channels up to which the convolution of our own is used, and the gradient of its weight:
// guesses, until they are measured.
constexpr int64_t kFewChannels = 16, kFewGradientChannels = 4;

bool prefers_own_kernel(const ConvReluPoolShape& shape) {
  const int64_t blocks =
      shape.N * ((shape.P + kWindowsY - 1) / kWindowsY) * ((shape.Q + kWindowsX - 1) / kWindowsX);
  return shape.is_plain() && shape.C <= kFewChannels && blocks < int64_t{1} << 31;
}

// Whether the filters lie side by side, kCount of them together everywhere.
template <int kCount>
bool lies_in_packs(const Tensor& image, const void* pointer) {
  bool fits = image.stride(1) == 1 && image.size(1) % kCount == 0;
  for (const int d : {0, 2, 3}) fits = fits && image.stride(d) % kCount == 0;
  return fits && reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Calls run(Index{}, pack), where pack() is the number of filters to a thread.
template <int kPack, class Run>
void for_windows(int64_t count, bool packed, Run&& run) {
  constexpr std::integral_constant<int, kPack> several;
  constexpr std::integral_constant<int, 1> one;
  if (count >= int64_t{1} << 31) {
    run(int64_t{}, one);
  } else if (packed) {
    run(unsigned{}, several);
  } else {
    run(unsigned{}, one);
  }
}

template <class T, int kKernel>
void launch_own(const ConvReluPoolCall<T>& call, cudaStream_t stream) {
  const unsigned tiles_x = blocks_for(call.Q, kWindowsX), tiles_y = blocks_for(call.P, kWindowsY);
  launch(conv_relu_pool_forward_kernel<T, kKernel>,
         dim3(static_cast<unsigned>(call.N) * tiles_x * tiles_y, blocks_for(call.K, kFilters)),
         dim3(kWindowsX * kWindowsY), 0, stream, call, tiles_x, tiles_y);
}

std::tuple<Tensor, Tensor> conv_relu_pool_forward(const Tensor& input, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const std::vector<int64_t>& stride,
                                                  const std::vector<int64_t>& padding,
                                                  const std::vector<int64_t>& dilation,
                                                  int64_t groups) {
  const ConvReluPoolShape shape =
      check_conv_relu_pool(input, weight, bias, stride, padding, dilation, groups);
  const OnDeviceOf on_device(input);
  const Tensor output = allocate_image(input, shape, shape.P, shape.Q);
  const Tensor codes = allocate_image(input, shape, shape.P, shape.Q, ScalarType::Byte);
  const int64_t count = output.numel();
  if (count == 0) return {output, codes};
  const std::optional<Tensor> b = bias ? std::optional(dense(*bias)) : std::nullopt;
  auto* const code = static_cast<uint8_t*>(codes.mutable_data_ptr());

  if (prefers_own_kernel(shape)) {
    dispatch_float_and_half("conv_relu_pool", input.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const ConvReluPoolCall<device_t<T>> call{shape.N,
                                               shape.C,
                                               shape.H,
                                               shape.W,
                                               shape.K,
                                               shape.P,
                                               shape.Q,
                                               shape.padding[0],
                                               shape.padding[1],
                                               data<T>(input),
                                               strides_of(input),
                                               data<T>(weight),
                                               strides_of(weight),
                                               b ? data<T>(*b) : nullptr,
                                               mutable_data<T>(output),
                                               code,
                                               strides_of(output)};
      if (shape.R == 3) {
        launch_own<device_t<T>, 3>(call, on_device.stream());
      } else {
        launch_own<device_t<T>, 5>(call, on_device.stream());
      }
    });
    return {output, codes};
  }

  const Tensor z = library_convolution(device_convolution, input, weight, std::nullopt, shape);
  dispatch_float_and_half("conv_relu_pool", input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using E = device_t<T>;
    constexpr int kPack = kVectorBytes / sizeof(E);
    const auto run = [&](auto index, auto pack) {
      using Index = decltype(index);
      const auto K = static_cast<Index>(shape.K), P = static_cast<Index>(shape.P);
      const auto Q = static_cast<Index>(shape.Q);
      const auto threads = static_cast<Index>(count / pack());
      launch(relu_pool_kernel<E, Index, pack()>, dim3(blocks_for(count / pack(), kThreads)),
             dim3(kThreads), 0, on_device.stream(), data<T>(z), strides_of(z),
             b ? data<T>(*b) : nullptr, mutable_data<T>(output), code, K, P, Q, shape.channels_last,
             threads);
    };
    const bool packed = shape.channels_last && lies_in_packs<kPack>(z, data<T>(z));
    for_windows<kPack>(count, packed, run);
  });
  return {output, codes};
}

// The codes are written all the same: a byte for each window beside the activations.
Tensor conv_relu_pool_inference(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups) {
  return std::get<0>(
      conv_relu_pool_forward(input, weight, bias, stride, padding, dilation, groups));
}

bool prefers_own_weight_gradient(const ConvReluPoolShape& shape, ScalarType dtype) {
  return shape.is_plain() && shape.C <= kFewGradientChannels && dtype != ScalarType::Double &&
         shape.N * shape.z_height() * shape.z_width() < int64_t{1} << 31;
}

template <class T, int kKernel, int kChannels>
void launch_weight_gradient(const WeightGradientCall<T>& call, unsigned blocks,
                            cudaStream_t stream) {
  launch(weight_gradient_kernel<T, kKernel, kChannels>,
         dim3(blocks, blocks_for(call.K, kGradientFilters), blocks_for(call.C, kChannels)),
         dim3(kWarp, kGradientWarps), 0, stream, call);
}

std::tuple<Tensor, Tensor, Tensor> own_weight_gradient(const ConvReluPoolShape& shape,
                                                       const Tensor& grad_output,
                                                       const Tensor& codes, const Tensor& input,
                                                       const Tensor& weight, bool needs_weight,
                                                       bool needs_bias, cudaStream_t stream) {
  Tensor grad_weight, grad_bias;
  if (needs_weight) grad_weight = allocate_like(weight);
  if (needs_bias) grad_bias = allocate(weight, {shape.K});
  const unsigned tiles_x = blocks_for((shape.z_width() + 1) / 2, kWindowsX);
  const unsigned tiles_y = blocks_for((shape.z_height() + 1) / 2, kWindowsY);
  const unsigned tiles = static_cast<unsigned>(shape.N) * tiles_x * tiles_y;
  const unsigned blocks = std::min<unsigned>(tiles, kGradientBlocks);
  const int64_t count = (shape.C * shape.R * shape.S + 1) * shape.K;
  const Tensor sums = allocate(input, std::array{blocks * count}, ScalarType::Float);
  dispatch_float_and_half("conv_relu_pool_backward", input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using E = device_t<T>;
    if constexpr (!std::is_same_v<T, double>) {
      const WeightGradientCall<E> call{shape.C,
                                       shape.H,
                                       shape.W,
                                       shape.K,
                                       shape.P,
                                       shape.Q,
                                       shape.z_height(),
                                       shape.z_width(),
                                       shape.padding[0],
                                       shape.padding[1],
                                       data<T>(input),
                                       strides_of(input),
                                       data<T>(grad_output),
                                       strides_of(grad_output),
                                       static_cast<const uint8_t*>(codes.const_data_ptr()),
                                       strides_of(codes),
                                       tiles_x,
                                       tiles_y,
                                       tiles,
                                       static_cast<float*>(sums.mutable_data_ptr())};
      const auto launch_sums = shape.R == 5       ? launch_weight_gradient<E, 5, 1>
                               : shape.C % 3 == 0 ? launch_weight_gradient<E, 3, 3>
                                                  : launch_weight_gradient<E, 3, 1>;
      launch_sums(call, blocks, stream);
      launch(collect_gradient_kernel<E>, dim3(blocks_for(count, kWarp)), dim3(kWarp, kSlices), 0,
             stream, call.sums, blocks, shape.C, shape.K, static_cast<int>(shape.R),
             needs_weight ? mutable_data<T>(grad_weight) : nullptr,
             needs_weight ? strides_of(grad_weight) : Strides4{},
             needs_bias ? mutable_data<T>(grad_bias) : nullptr);
    }
  });
  return {Tensor(), grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_pool_backward(
    const Tensor& grad_output, const Tensor& codes, const Tensor& input, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool needs_input, bool needs_weight,
    bool needs_bias) {
  const ConvReluPoolShape shape =
      check_conv_relu_pool(input, weight, std::nullopt, stride, padding, dilation, groups);
  check_conv_relu_pool_backward(shape, grad_output, codes, input);
  const OnDeviceOf on_device(input);
  const ScalarType dtype = input.scalar_type();
  if (prefers_own_weight_gradient(shape, dtype) && !needs_input && shape.N > 0) {
    return own_weight_gradient(shape, grad_output, codes, input, weight, needs_weight, needs_bias,
                               on_device.stream());
  }
  const Tensor grad_z = allocate_image(input, shape, shape.z_height(), shape.z_width());
  if (grad_z.numel() > 0) {
    const int64_t count =
        shape.N * shape.K * ((shape.z_height() + 1) / 2) * ((shape.z_width() + 1) / 2);
    dispatch_float_and_half("conv_relu_pool_backward", dtype, [&](auto type) {
      using T = decltype(type);
      using E = device_t<T>;
      constexpr int kPack = kVectorBytes / sizeof(E);
      const auto* const code = static_cast<const uint8_t*>(codes.const_data_ptr());
      const auto run = [&](auto index, auto pack) {
        using Index = decltype(index);
        const auto K = static_cast<Index>(shape.K), P = static_cast<Index>(shape.P);
        const auto Q = static_cast<Index>(shape.Q);
        const auto height = static_cast<Index>(shape.z_height());
        const auto width = static_cast<Index>(shape.z_width());
        const auto threads = static_cast<Index>(count / pack());
        launch(expand_kernel<E, Index, pack()>, dim3(blocks_for(count / pack(), kThreads)),
               dim3(kThreads), 0, on_device.stream(), data<T>(grad_output), strides_of(grad_output),
               code, strides_of(codes), mutable_data<T>(grad_z), strides_of(grad_z), K, P, Q,
               height, width, shape.channels_last, threads);
      };
      const bool packed = shape.channels_last && lies_in_packs<kPack>(codes, code) &&
                          lies_in_packs<kPack>(grad_z, data<T>(grad_z));
      for_windows<kPack>(count, packed, run);
    });
  }
  const DeterministicLibrary deterministic;
  return library_convolution_backward(device_convolution_backward, grad_z, input, weight, shape,
                                      needs_input, needs_weight, needs_bias);
}

}  // namespace

FASTNET_CUDA_LIBRARY(library) {
  library.impl("conv_relu_pool_forward", TORCH_BOX(&conv_relu_pool_forward));
  library.impl("conv_relu_pool_inference", TORCH_BOX(&conv_relu_pool_inference));
  library.impl("conv_relu_pool_backward", TORCH_BOX(&conv_relu_pool_backward));
}

}  // namespace fastnet
