// conv_relu_pool on CUDA; the op's definition stands in ../conv_relu_pool.h. The speed of nothing
// of this has been measured on a card yet.
//
// Forward: where input channels are few, a convolution of our own that keeps the sums of whole
// windows in registers; else the library's convolution, and one pass for bias, ReLU, maximum and
// codes. Backward: where channels are few and the input's gradient is not wanted, as in a network's
// first layer, the weight's from the pooled gradient and the codes alone; else the gradient
// expanded to the convolution's output, for the library's backward. Sums are added in an order that
// the shape alone decides.

#include "conv_relu_pool_few_channels_kernels.cuh"
#include "conv_relu_pool_passes.cuh"
#include "library_calls.cuh"

namespace fastnet {
namespace {

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
  const unsigned tiles = static_cast<unsigned>(call.N) * tiles_x * tiles_y;
  const unsigned all = blocks_for(call.K, kFilters);
  // A block that has loaded its input goes on with the next filters, as long as blocks are enough.
  constexpr int64_t kFullBlocks = 2048;
  const unsigned groups =
      call.C > kChannels
          ? 1
          : static_cast<unsigned>(std::clamp<int64_t>(int64_t{tiles} * all / kFullBlocks, 1, all));
  launch(conv_relu_pool_forward_kernel<T, kKernel>, dim3(tiles, blocks_for(all, groups)),
         dim3(kWindowsX * kWindowsY), 0, stream, call, tiles_x, tiles_y, groups);
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
