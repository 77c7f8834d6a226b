// conv_relu_pool: output = max_pool2d(relu(conv2d(input, weight, bias)), 2), and which position of
// each 2 x 2 window won
//
//   input  (N, C, H, W)          any strides
//   weight (K, C / groups, R, S)
//   bias   (K)                   may be absent
//   output (N, K, P, Q)          channels_last where input or weight is, as torch's
//   codes  (N, K, P, Q)          uint8, laid out as output: 2·dy + dx of the winner, or kDead where
//                                the ReLU passed nothing, and so no gradient goes back
//
// The maximum commutes with the bias and the ReLU, so neither the sums nor the activations ever
// stand in memory at full resolution. Of several equal maxima the first wins, of NaNs the last, as
// in torch. The backward, with z the convolution's output:
//   grad_z[n, k, 2p + dy, 2q + dx] = grad_output[n, k, p, q] at the winner, 0 elsewhere
// which is at least three quarters zeros, and what the convolution's own gradients need.
//
// The rules of shape and dtype, checked alike on every device.
#pragma once

#include <limits>

#include "common.h"

namespace fastnet {

inline constexpr uint8_t kDead = 4;

struct ConvReluPoolShape {
  int64_t N, C, H, W, K, R, S;
  int64_t P, Q;  // of the pooled output
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
  bool channels_last;

  int64_t z_height() const { return size(H, R, 0); }  // of the convolution's output
  int64_t z_width() const { return size(W, S, 1); }
  // Whether this is a plain convolution of 3 x 3 or 5 x 5, which kernels of our own take.
  bool is_plain() const {
    return stride == std::array<int64_t, 2>{1, 1} && dilation == stride && groups == 1 && R == S &&
           (R == 3 || R == 5);
  }

 private:
  int64_t size(int64_t length, int64_t kernel, int d) const {
    return (length + 2 * padding[d] - dilation[d] * (kernel - 1) - 1) / stride[d] + 1;
  }
};

struct Strides4 {
  int64_t n, c, y, x;
};

inline Strides4 strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// Whether torch takes the strides of a four-dimensional tensor for channels_last ones: ascending in
// the order C, W, H, N, and no plain contiguous tensor's.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    const int64_t stride = tensor.stride(d), size = tensor.size(d);
    if (size == 0 || stride < least || (d == 0 && least == tensor.stride(1))) return false;
    least = stride * (size > 1 ? size : 1);
  }
  return true;
}

inline ConvReluPoolShape check_conv_relu_pool(const Tensor& input, const Tensor& weight,
                                              const std::optional<Tensor>& bias,
                                              const std::vector<int64_t>& stride,
                                              const std::vector<int64_t>& padding,
                                              const std::vector<int64_t>& dilation,
                                              int64_t groups) {
  check(input.dim() == 4, "conv_relu_pool: input must be (N, C, H, W), but is ", ShapeOf{input});
  check(weight.dim() == 4,
        "conv_relu_pool: weight must be (out_channels, in_channels / groups, height, width), but "
        "is ",
        ShapeOf{weight});
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
        "conv_relu_pool: stride, padding and dilation must be of two numbers each");
  for (int d = 0; d < 2; ++d) {
    check(stride[d] > 0, "conv_relu_pool: stride must be positive, but is ", stride[d]);
    check(padding[d] >= 0, "conv_relu_pool: padding must not be negative, but is ", padding[d]);
    // Or the padded size would not be a number, and might look like a fitting one.
    const int64_t most = (std::numeric_limits<int64_t>::max() - input.size(2 + d)) / 2;
    check(padding[d] <= most, "conv_relu_pool: padding must be at most ", most, ", but is ",
          padding[d]);
    check(dilation[d] > 0, "conv_relu_pool: dilation must be positive, but is ", dilation[d]);
  }
  ConvReluPoolShape shape{input.size(0),
                          input.size(1),
                          input.size(2),
                          input.size(3),
                          weight.size(0),
                          weight.size(2),
                          weight.size(3),
                          0,
                          0,
                          {stride[0], stride[1]},
                          {padding[0], padding[1]},
                          {dilation[0], dilation[1]},
                          groups,
                          is_channels_last(input) || is_channels_last(weight)};
  check(groups > 0 && shape.K % groups == 0, "conv_relu_pool: groups must divide the ", shape.K,
        " output channels, but is ", groups);
  check(shape.C == weight.size(1) * groups, "conv_relu_pool: input ", ShapeOf{input}, " has ",
        shape.C, " channels, but weight ", ShapeOf{weight}, " takes ", weight.size(1) * groups,
        " in ", groups, " groups");
  check(shape.C > 0 && shape.K > 0 && shape.R > 0 && shape.S > 0,
        "conv_relu_pool: no channels or an empty kernel: input ", ShapeOf{input}, ", weight ",
        ShapeOf{weight});
  check(shape.H > 0 && shape.W > 0, "conv_relu_pool: images without pixels: input ",
        ShapeOf{input});
  for (int d = 0; d < 2; ++d) {
    check(input.size(2 + d) + 2 * padding[d] > dilation[d] * (weight.size(2 + d) - 1),
          "conv_relu_pool: the kernel ", ShapeOf{weight}, " with dilation ", dilation[d],
          " is larger than the padded input ", ShapeOf{input});
  }
  shape.P = shape.z_height() / 2;
  shape.Q = shape.z_width() / 2;
  check(shape.P > 0 && shape.Q > 0, "conv_relu_pool: the convolution's output is ",
        shape.z_height(), " x ", shape.z_width(), ", too small for a window of 2 x 2");
  for (const Tensor* tensor : {&weight, bias ? &*bias : &weight}) {
    check(tensor->scalar_type() == input.scalar_type(), "conv_relu_pool: input is ",
          input.scalar_type(), ", but weight or bias is ", tensor->scalar_type(),
          "; convert one of them");
    check(tensor->device() == input.device(),
          "conv_relu_pool: input, weight and bias are on different devices");
  }
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == shape.K, "conv_relu_pool: bias must be (", shape.K,
          "), one value per row of weight ", ShapeOf{weight}, ", but is ", ShapeOf{*bias});
  }
  return shape;
}

inline void check_conv_relu_pool_backward(const ConvReluPoolShape& shape, const Tensor& grad_output,
                                          const Tensor& codes, const Tensor& input) {
  const std::array<int64_t, 4> sizes{shape.N, shape.K, shape.P, shape.Q};
  for (const Tensor* tensor : {&grad_output, &codes}) {
    bool fits = tensor->dim() == 4;
    for (int d = 0; fits && d < 4; ++d) fits = tensor->size(d) == sizes[d];
    check(fits, "conv_relu_pool_backward: the output was (", shape.N, ", ", shape.K, ", ", shape.P,
          ", ", shape.Q, "), but grad_output or codes is ", ShapeOf{*tensor});
    check(tensor->device() == input.device(),
          "conv_relu_pool_backward: the arguments are on different devices");
  }
  check(grad_output.scalar_type() == input.scalar_type(), "conv_relu_pool_backward: input is ",
        input.scalar_type(), ", but grad_output is ", grad_output.scalar_type());
  check(codes.scalar_type() == ScalarType::Byte,
        "conv_relu_pool_backward: codes must be uint8, but are ", codes.scalar_type());
}

// Uninitialised (N, K, height, width), dense, in the output's memory format. That of one channel
// is both; torch's own operators give it the strides of a contiguous one.
inline Tensor allocate_image(const Tensor& like, const ConvReluPoolShape& shape, int64_t height,
                             int64_t width, std::optional<ScalarType> dtype = std::nullopt) {
  const std::array<int64_t, 4> sizes{shape.N, shape.K, height, width};
  if (!shape.channels_last || shape.K == 1) return allocate(like, sizes, dtype);
  // No transposed view of a dense one: autograd would not let anybody write to what an op returns.
  const int64_t row = std::max<int64_t>(1, width) * shape.K;
  const std::array<int64_t, 4> strides{std::max<int64_t>(1, height) * row, 1, row, shape.K};
  return allocate_strided(like, sizes, strides.data(), dtype);
}

// ---------------------------------------------------------------------------------------------
// The convolution of torch's library and its gradients, for shapes that it is best at. The C
// interface differs between devices by name only, so each passes its own functions.

template <class Convolution>
Tensor library_convolution(Convolution* convolution, const Tensor& input, const Tensor& weight,
                           const std::optional<Tensor>& bias, const ConvReluPoolShape& shape) {
  NoGrad no_grad;
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr;
  const std::array<int64_t, 2> none{0, 0};
  AtenTensorHandle z = nullptr;
  check_torch(convolution(input.get(), weight.get(), bias ? &bias_handle : nullptr,
                          shape.stride.data(), 2, shape.padding.data(), 2, shape.dilation.data(), 2,
                          /*transposed=*/0, none.data(), 2, shape.groups, &z),
              "conv_relu_pool: torch's convolution failed");
  return Tensor(z);
}

// With the strides that torch.empty_like gives.
inline Tensor laid_out_like(const Tensor& like, const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  const auto has_strides_of = [&](const Tensor& other) {
    for (int64_t d = 0; d < like.dim(); ++d) {
      if (like.size(d) != 1 && other.stride(d) != tensor.stride(d)) return false;
    }
    return true;
  };
  if (has_strides_of(like)) return tensor;  // as it is dense, torch would give these
  Tensor result = allocate_like(like);
  return has_strides_of(result) ? tensor : torch::stable::copy_(result, tensor);
}

template <class Backward>
std::tuple<Tensor, Tensor, Tensor> library_convolution_backward(
    Backward* backward, const Tensor& grad_z, const Tensor& input, const Tensor& weight,
    const ConvReluPoolShape& shape, bool needs_input, bool needs_weight, bool needs_bias) {
  NoGrad no_grad;
  if (shape.N == 0) {  // of which some torch versions make no gradients
    const auto zeros = [](bool needed, Tensor gradient) {
      return needed ? torch::stable::zero_(gradient) : Tensor();
    };
    return {zeros(needs_input, allocate_like(input)), zeros(needs_weight, allocate_like(weight)),
            zeros(needs_bias, allocate(weight, {shape.K}))};
  }
  const std::array<int64_t, 2> none{0, 0};
  const int64_t bias_size = shape.K;
  const int64_t* bias_sizes = &bias_size;
  const std::array<int32_t, 3> wanted{needs_input, needs_weight, needs_bias};
  std::array<AtenTensorHandle, 3> gradients{};
  check_torch(
      backward(grad_z.get(), input.get(), weight.get(), &bias_sizes, 1, shape.stride.data(), 2,
               shape.padding.data(), 2, shape.dilation.data(), 2, /*transposed=*/0, none.data(), 2,
               shape.groups, wanted.data(), 3, &gradients[0], &gradients[1], &gradients[2]),
      "conv_relu_pool_backward: torch's convolution_backward failed");
  // A gradient that was not asked for comes as an undefined tensor, or as none. All are owned
  // before anything can fail.
  const auto tensor = [&](int i) {
    const Tensor gradient = gradients[i] ? Tensor(gradients[i]) : Tensor();
    return wanted[i] ? gradient : Tensor();
  };
  const Tensor of_input = tensor(0), of_weight = tensor(1), of_bias = tensor(2);
  return {laid_out_like(input, of_input), laid_out_like(weight, of_weight), of_bias};
}

}  // namespace fastnet
