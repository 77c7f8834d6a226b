// linear_relu: output = relu(input · weightᵀ + bias)
//
//   input  (*, K)   K = in_features; * is any number of leading dimensions, also none
//   weight (N, K)   N = out_features
//   bias   (N)      may be absent
//   output (*, N)
//
// The rules of shape and dtype, checked alike on every device.
#pragma once

#include "common.h"

namespace fastnet {

struct LinearReluShape {
  int64_t rows;          // M: the product of the leading dimensions
  int64_t in_features;   // K
  int64_t out_features;  // N
};

inline LinearReluShape check_linear_relu(const Tensor& input, const Tensor& weight,
                                         const std::optional<Tensor>& bias) {
  check(input.dim() >= 1, "linear_relu: input must have at least one dimension, but is a scalar");
  check(weight.dim() == 2, "linear_relu: weight must be (out_features, in_features), but is ",
        ShapeOf{weight});
  const int64_t in_features = input.size(input.dim() - 1);
  check(in_features == weight.size(1), "linear_relu: input ", ShapeOf{input}, " has ", in_features,
        " features, but weight ", ShapeOf{weight}, " takes ", weight.size(1));
  check(input.scalar_type() == weight.scalar_type(), "linear_relu: input is ", input.scalar_type(),
        ", but weight is ", weight.scalar_type(), "; convert one of them");
  check(input.device() == weight.device(),
        "linear_relu: input and weight are on different devices");
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == weight.size(0), "linear_relu: bias must be (",
          weight.size(0), "), one value per row of weight ", ShapeOf{weight}, ", but is ",
          ShapeOf{*bias});
    check(bias->scalar_type() == weight.scalar_type(), "linear_relu: bias is ", bias->scalar_type(),
          ", but weight is ", weight.scalar_type());
    check(bias->device() == weight.device(),
          "linear_relu: bias and weight are on different devices");
  }
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) rows *= input.size(d);
  return {rows, in_features, weight.size(0)};
}

// input is given where the weight's gradient is wanted, weight where the input's is.
inline LinearReluShape check_linear_relu_backward(const Tensor& grad_output, const Tensor& output,
                                                  const std::optional<Tensor>& input,
                                                  const std::optional<Tensor>& weight) {
  check(output.dim() >= 1, "linear_relu_backward: output must have at least one dimension");
  LinearReluShape shape{1, 0, output.size(output.dim() - 1)};
  for (int64_t d = 0; d + 1 < output.dim(); ++d) shape.rows *= output.size(d);
  if (input) {
    check(input->dim() >= 1, "linear_relu_backward: input must have at least one dimension");
    shape.in_features = input->size(input->dim() - 1);
    check(input->numel() == shape.rows * shape.in_features, "linear_relu_backward: input ",
          ShapeOf{*input}, " does not fit output ", ShapeOf{output});
  }
  if (weight) {
    check(weight->dim() == 2 && weight->size(0) == shape.out_features &&
              (!input || weight->size(1) == shape.in_features),
          "linear_relu_backward: weight ", ShapeOf{*weight}, " does not fit output ",
          ShapeOf{output});
    shape.in_features = weight->size(1);
  }
  for (const Tensor* tensor :
       {&grad_output, input ? &*input : &output, weight ? &*weight : &output}) {
    check(tensor->scalar_type() == output.scalar_type(), "linear_relu_backward: output is ",
          output.scalar_type(), ", but another argument is ", tensor->scalar_type());
    check(tensor->device() == output.device(),
          "linear_relu_backward: the arguments are on different devices");
  }
  check(grad_output.numel() == output.numel(), "linear_relu_backward: grad_output ",
        ShapeOf{grad_output}, " does not fit output ", ShapeOf{output});
  return shape;
}

// A tensor's shape with the last dimension replaced: output's from input's, input's from output's.
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t features) {
  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  shape.back() = features;
  return shape;
}

// A matrix (M, N) as (*, N). No view of it: autograd would not let anybody write to what an op
// returns.
inline Tensor with_leading(const Tensor& matrix, const std::vector<int64_t>& sizes) {
  if (sizes.size() == 2) return matrix;
  return call_native("aten::_unsafe_view", "", matrix,
                     torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

}  // namespace fastnet
