// The ops' CPU kernels as plain functions. The dispatcher calls them (see the
// STABLE_TORCH_LIBRARY_IMPL of each file), and so does csrc/autograd where it has nothing to do:
// its way from one library to another, by boxed arguments, takes longer than the kernel of a small
// layer.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../optimizer.h"

namespace fastnet::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

Tensor linear_relu_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_output,
                                                        const Tensor& output,
                                                        const OptionalTensor& input,
                                                        const OptionalTensor& weight,
                                                        bool needs_bias);

Tensor linear_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output,
                                                   const OptionalTensor& input,
                                                   const OptionalTensor& weight, bool needs_bias);

// Whether a layer of that size is quicker by these two than by torch's product, with autograd's own
// nodes around it.
bool prefers_linear(int64_t rows, int64_t in_features, int64_t out_features,
                    torch::headeronly::ScalarType dtype);

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction,
                                                 int64_t ignore_index, double label_smoothing);
Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const Tensor& statistics,
                              int64_t reduction, int64_t ignore_index, double label_smoothing);
void cross_entropy_backward_out(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                const OptionalTensor& weight, const Tensor& statistics,
                                int64_t reduction, int64_t ignore_index, double label_smoothing,
                                Tensor gradient);
std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& target,
                                                       const OptionalTensor& weight,
                                                       int64_t reduction, int64_t ignore_index,
                                                       double label_smoothing);
Tensor cross_entropy_with_gradient_out(const Tensor& logits, const Tensor& target,
                                       const OptionalTensor& weight, int64_t reduction,
                                       int64_t ignore_index, double label_smoothing,
                                       Tensor gradient);
// The same of dense (N, C) logits and N classes in memory at hand: at ten classes what torch's
// stable interface takes to tell of tensors is twice as long as the kernel.
void cross_entropy_rows(const float* logits, const int64_t* target, int64_t N, int64_t C,
                        int64_t reduction, int64_t ignore_index, float* loss, float* gradient);

std::tuple<Tensor, Tensor> conv_relu_pool_forward(const Tensor& input, const Tensor& weight,
                                                  const OptionalTensor& bias, const Sizes& stride,
                                                  const Sizes& padding, const Sizes& dilation,
                                                  int64_t groups);
Tensor conv_relu_pool_inference(const Tensor& input, const Tensor& weight,
                                const OptionalTensor& bias, const Sizes& stride,
                                const Sizes& padding, const Sizes& dilation, int64_t groups);
std::tuple<Tensor, Tensor, Tensor> conv_relu_pool_backward(
    const Tensor& grad_output, const Tensor& codes, const Tensor& input, const Tensor& weight,
    const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
    bool needs_input, bool needs_weight, bool needs_bias);

// A step of all of these.
void apply_optimizer(const std::vector<OptimizedTensor>& tensors);

// What fastnet._C hands to fastnet._nodes of the same build, in a capsule.
struct Ops {
  decltype(&cpu::linear_relu_forward) linear_relu_forward = &cpu::linear_relu_forward;
  decltype(&cpu::linear_relu_backward) linear_relu_backward = &cpu::linear_relu_backward;
  decltype(&cpu::linear_forward) linear_forward = &cpu::linear_forward;
  decltype(&cpu::linear_backward) linear_backward = &cpu::linear_backward;
  decltype(&cpu::prefers_linear) prefers_linear = &cpu::prefers_linear;
  decltype(&cpu::cross_entropy_forward) cross_entropy_forward = &cpu::cross_entropy_forward;
  decltype(&cpu::cross_entropy_backward) cross_entropy_backward = &cpu::cross_entropy_backward;
  decltype(&cpu::cross_entropy_backward_out) cross_entropy_backward_out =
      &cpu::cross_entropy_backward_out;
  decltype(&cpu::cross_entropy_with_gradient) cross_entropy_with_gradient =
      &cpu::cross_entropy_with_gradient;
  decltype(&cpu::cross_entropy_with_gradient_out) cross_entropy_with_gradient_out =
      &cpu::cross_entropy_with_gradient_out;
  decltype(&cpu::cross_entropy_rows) cross_entropy_rows = &cpu::cross_entropy_rows;
  decltype(&cpu::conv_relu_pool_forward) conv_relu_pool_forward = &cpu::conv_relu_pool_forward;
  decltype(&cpu::conv_relu_pool_inference) conv_relu_pool_inference =
      &cpu::conv_relu_pool_inference;
  decltype(&cpu::conv_relu_pool_backward) conv_relu_pool_backward = &cpu::conv_relu_pool_backward;
  decltype(&cpu::apply_optimizer) apply_optimizer = &cpu::apply_optimizer;
};

inline constexpr const char* kOpsCapsule = "fastnet._C.cpu_ops";

}  // namespace fastnet::cpu
