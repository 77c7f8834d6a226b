// conv_relu_pool on CUDA; the op's definition stands in ../conv_relu_pool.h. Nothing of this has
// been measured on a card yet.
//
// Forward: where input channels are few, a convolution of our own that keeps the sums of whole
// windows in registers; else the library's convolution, and one pass for bias, ReLU, maximum and
// codes. Backward: the gradient expanded to the convolution's output, for the library's backward.

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
  __shared__ A weights[kChannels][kFilters][kTaps];
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
      const int64_t from_y = 2 * p_first + y - call.pad_y, from_x = 2 * q_first + x - call.pad_x;
      const bool is_inside = from_y >= 0 && from_y < call.H && from_x >= 0 && from_x < call.W;
      input[c][y][x] =
          is_inside ? widen(call.input[n * call.input_at.n + (c_first + c) * call.input_at.c +
                                       from_y * call.input_at.y + from_x * call.input_at.x])
                    : A(0);
    }
    for (int i = thread; i < channels * kFilters * kTaps; i += kThreads) {
      const int tap = i % kTaps, k = i / kTaps % kFilters, c = i / (kTaps * kFilters);
      const A w = k_first + k < call.K ? widen(call.weight[(k_first + k) * call.weight_at.n +
                                                           (c_first + c) * call.weight_at.c +
                                                           tap / kKernel * call.weight_at.y +
                                                           tap % kKernel * call.weight_at.x])
                                       : A(0);
      weights[c][k][tap] = w;
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
          const A product = weights[c][k][tap] * value;
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
      for (int k = 0; k < kFilters; ++k) {
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const A w = weights[c][k][tap];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sum[k][i] += w * patch[tap / kKernel + i / 2][tap % kKernel + i % 2];
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
// The passes around the library's convolution. A thread has an element of the tensor that is
// written, in the order of its memory: neighbours write side by side.

struct Position {
  int64_t n, k, y, x;
};

__device__ __forceinline__ Position position_of(int64_t index, int64_t K, int64_t height,
                                                int64_t width, bool channels_last) {
  if (channels_last) {
    const int64_t pixel = index / K;
    return {pixel / (height * width), index % K, pixel / width % height, pixel % width};
  }
  return {index / (K * height * width), index / (height * width) % K, index / width % height,
          index % width};
}

template <class T>
__global__ void relu_pool_kernel(const T* z, Strides4 z_at, const T* bias, T* output,
                                 uint8_t* codes, int64_t K, int64_t P, int64_t Q,
                                 bool channels_last, int64_t count) {
  using A = acc_t<T>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const Position at = position_of(index, K, P, Q, channels_last);
  const T* const from = z + at.n * z_at.n + at.k * z_at.c + 2 * at.y * z_at.y + 2 * at.x * z_at.x;
  const A shift = bias ? widen(bias[at.k]) : A(0);
  A y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = widen(from[i / 2 * z_at.y + i % 2 * z_at.x]) + shift;
  write_window<T, A>(y, output + index, codes + index);
}

template <class T>
__global__ void expand_kernel(const T* grad_output, Strides4 grad_output_at, const uint8_t* codes,
                              Strides4 codes_at, T* grad_z, int64_t K, int64_t P, int64_t Q,
                              int64_t height, int64_t width, bool channels_last, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const Position at = position_of(index, K, height, width, channels_last);
  const int64_t p = at.y / 2, q = at.x / 2;
  bool is_winner = p < P && q < Q;
  if (is_winner) {
    const uint8_t code =
        codes[at.n * codes_at.n + at.k * codes_at.c + p * codes_at.y + q * codes_at.x];
    is_winner = code == 2 * (at.y % 2) + at.x % 2;
  }
  if (is_winner) {
    grad_z[index] = grad_output[at.n * grad_output_at.n + at.k * grad_output_at.c +
                                p * grad_output_at.y + q * grad_output_at.x];
  } else {
    narrow(acc_t<T>(0), grad_z + index);
  }
}

// ---------------------------------------------------------------------------------------------

inline constexpr int kThreads = 256;
// Input channels up to which the convolution of our own is used: a guess, until it is measured.
constexpr int64_t kFewChannels = 16;

bool prefers_own_kernel(const ConvReluPoolShape& shape) {
  const int64_t blocks =
      shape.N * ((shape.P + kWindowsY - 1) / kWindowsY) * ((shape.Q + kWindowsX - 1) / kWindowsX);
  return shape.is_plain() && shape.C <= kFewChannels && blocks < int64_t{1} << 31;
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
    launch(relu_pool_kernel<device_t<T>>, dim3(blocks_for(count, kThreads)), dim3(kThreads), 0,
           on_device.stream(), data<T>(z), strides_of(z), b ? data<T>(*b) : nullptr,
           mutable_data<T>(output), code, shape.K, shape.P, shape.Q, shape.channels_last, count);
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

std::tuple<Tensor, Tensor, Tensor> conv_relu_pool_backward(
    const Tensor& grad_output, const Tensor& codes, const Tensor& input, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool needs_input, bool needs_weight,
    bool needs_bias) {
  const ConvReluPoolShape shape =
      check_conv_relu_pool(input, weight, std::nullopt, stride, padding, dilation, groups);
  check_conv_relu_pool_backward(shape, grad_output, codes, input);
  const OnDeviceOf on_device(input);
  const Tensor grad_z = allocate_image(input, shape, shape.z_height(), shape.z_width());
  const int64_t count = grad_z.numel();
  if (count > 0) {
    dispatch_float_and_half("conv_relu_pool_backward", input.scalar_type(), [&](auto type) {
      using T = decltype(type);
      launch(expand_kernel<device_t<T>>, dim3(blocks_for(count, kThreads)), dim3(kThreads), 0,
             on_device.stream(), data<T>(grad_output), strides_of(grad_output),
             static_cast<const uint8_t*>(codes.const_data_ptr()), strides_of(codes),
             mutable_data<T>(grad_z), shape.K, shape.P, shape.Q, shape.z_height(), shape.z_width(),
             shape.channels_last, count);
    });
  }
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
