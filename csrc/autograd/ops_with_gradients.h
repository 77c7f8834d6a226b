// The ops with their nodes: what each saves, and its gradients.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/item.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kept_memory.h"
#include "node.h"
#include "op.h"

namespace fastnet::autograd {
namespace {

// Whether somebody wants to differentiate the gradient, which may have a tangent, or to map over
// it. As in fastnet/_library.py.
bool is_differentiated() {
  return c10::GradMode::is_enabled() || torch::autograd::ForwardADLevel::try_get_by_idx(0) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The tensors that a function in fastnet/ops/<op>.py gives.
template <class... Arguments>
variable_list from_python(const char* op, const char* function, const Arguments&... arguments) {
  const pybind11::gil_scoped_acquire gil;
  const auto module = pybind11::module_::import((std::string("fastnet.ops.") + op).c_str());
  variable_list tensors;
  for (const auto tensor : pybind11::tuple(module.attr(function)(arguments...))) {
    tensors.push_back(tensor.is_none() ? Tensor() : tensor.cast<Tensor>());
  }
  return tensors;
}

// The gradients by native operators, which torch knows how to differentiate.
template <class... Arguments>
variable_list differentiable(const char* op, const Arguments&... arguments) {
  return from_python(op, "differentiate", arguments...);
}

// Among saved tensors an undefined one stands for one that is not there.
OptionalTensor given(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor ? *tensor : Tensor();
}

// ------------------------------------------------------------------------------------------------
// linear_relu

// Saves the output, whose sign is the ReLU's mask, and the factors that a gradient needs.
struct LinearReLU {
  static constexpr const char* kName = "LinearReLUBackward";
  static constexpr size_t kSaved = 3;
  using Options = std::tuple<>;

  template <class Saved>
  static variable_list backward(const Tensor& grad_output, const Saved& saved, const Options&,
                                const std::vector<bool>& needs) {
    static const Op<&cpu::Ops::linear_relu_backward> backward_op("fastnet::linear_relu_backward");
    const Tensor output = saved[0];
    const OptionalTensor input = needs[1] ? given(saved[1]) : std::nullopt;
    const OptionalTensor weight = needs[0] ? given(saved[2]) : std::nullopt;
    if (is_differentiated()) {
      return differentiable("linear_relu", grad_output, output, input, weight, bool(needs[2]));
    }
    auto [of_input, of_weight, of_bias] = backward_op(grad_output, output, input, weight, needs[2]);
    return {of_input, of_weight, of_bias};
  }
};

Tensor linear_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const Op<&cpu::Ops::linear_relu_forward> forward("fastnet::linear_relu_forward");
  Tensor output = forward(input, weight, bias);
  if (is_trained(input, weight, bias)) {
    const auto save = [&](auto& node) {
      node.save({output, weight.requires_grad() ? input : Tensor(),
                 input.requires_grad() ? weight : Tensor()},
                {});
    };
    record<LinearReLU>(output, save, input, weight, bias);
  }
  return output;
}

// ------------------------------------------------------------------------------------------------
// linear: without a ReLU

// Saves the factors that a gradient needs.
struct Linear {
  static constexpr const char* kName = "LinearBackward";
  static constexpr size_t kSaved = 2;
  using Options = std::tuple<>;

  template <class Saved>
  static variable_list backward(const Tensor& grad_output, const Saved& saved, const Options&,
                                const std::vector<bool>& needs) {
    static const Op<&cpu::Ops::linear_backward> backward_op("fastnet::linear_backward");
    const OptionalTensor input = needs[1] ? given(saved[0]) : std::nullopt;
    const OptionalTensor weight = needs[0] ? given(saved[1]) : std::nullopt;
    if (is_differentiated()) {  // by native operators, which torch knows how to
      const Tensor rows = grad_output.reshape({-1, grad_output.size(-1)});
      return {weight ? at::matmul(grad_output, *weight) : Tensor(),
              input ? at::mm(rows.t(), input->reshape({-1, input->size(-1)})) : Tensor(),
              needs[2] ? at::sum(rows, 0) : Tensor()};
    }
    auto [of_input, of_weight, of_bias] = backward_op(grad_output, input, weight, needs[2]);
    return {of_input, of_weight, of_bias};
  }
};

Tensor own_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const Op<&cpu::Ops::linear_forward> forward("fastnet::linear_forward");
  Tensor output = forward(input, weight, bias);
  if (is_trained(input, weight, bias)) {
    const auto save = [&](auto& node) {
      node.save(
          {weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor()},
          {});
    };
    record<Linear>(output, save, input, weight, bias);
  }
  return output;
}

bool prefers_own_linear(const Tensor& input, const Tensor& weight, at::ScalarType dtype) {
  const int64_t in_features = weight.size(1), out_features = weight.size(0);
  return weight.is_contiguous() && input.size(-1) == in_features && input.numel() > 0 &&
         out_features > 0 &&
         cpu_ops->prefers_linear(input.numel() / in_features, in_features, out_features, dtype);
}

// ------------------------------------------------------------------------------------------------
// cross_entropy

bool is_real(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return dtype == at::kFloat || dtype == at::kDouble;
}

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction,
                                                 int64_t ignore_index, double label_smoothing) {
  static const Op<&cpu::Ops::cross_entropy_forward> forward("fastnet::cross_entropy_forward");
  return forward(logits, target, weight, reduction, ignore_index, label_smoothing);
}

// Whether the gradient is so large that its memory is kept.
bool has_kept_memory(const Tensor& logits) {
  return logits.is_cpu() && logits.nbytes() >= KeptMemory::kLeastBytes;
}

// Whether a call is recorded or only pretended: then it must say the same whatever the numbers are.
bool is_traced(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kTracing{DispatchKey::Python, DispatchKey::Functionalize};
  return tensor.key_set().has_any(kTracing) ||
         c10::impl::tls_is_dispatch_key_included(DispatchKey::Python);
}

// Whether these are what cpu::cross_entropy_rows takes, and nothing stands between.
bool are_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
              double label_smoothing) {
  return !weight && label_smoothing == 0 && is_unobserved() && is_plain(logits) &&
         is_plain(target) && logits.scalar_type() == at::kFloat && logits.dim() == 2 &&
         logits.numel() > 0 && logits.is_contiguous() && target.scalar_type() == at::kLong &&
         target.dim() == 1 && target.size(0) == logits.size(0) && target.is_contiguous();
}

// The loss and its gradient.
std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& target,
                                                       const OptionalTensor& weight,
                                                       int64_t reduction, int64_t ignore_index,
                                                       double label_smoothing) {
  static const Op<&cpu::Ops::cross_entropy_with_gradient> forward(
      "fastnet::cross_entropy_with_gradient");
  static const Op<&cpu::Ops::cross_entropy_with_gradient_out> forward_into(
      "fastnet::cross_entropy_with_gradient", "out");
  const bool is_kept = has_kept_memory(logits);
  if (!is_kept && are_rows(logits, target, weight, label_smoothing)) {
    const Tensor loss(at::detail::empty_cpu({}, at::kFloat));
    const Tensor gradient(at::detail::empty_cpu(logits.sizes(), at::kFloat));
    cpu_ops->cross_entropy_rows(logits.const_data_ptr<float>(), target.const_data_ptr<int64_t>(),
                                logits.size(0), logits.size(1), reduction, ignore_index,
                                loss.mutable_data_ptr<float>(), gradient.mutable_data_ptr<float>());
    return {loss, gradient};
  }
  Tensor loss, memory = is_kept ? kept_memory().take(logits) : Tensor();
  if (memory.defined()) {
    loss = forward_into(logits, target, weight, reduction, ignore_index, label_smoothing, memory);
  } else {
    std::tie(loss, memory) =
        forward(logits, target, weight, reduction, ignore_index, label_smoothing);
  }
  return {loss, is_kept ? kept_memory().lend(memory) : memory};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const Tensor& statistics,
                              int64_t reduction, int64_t ignore_index, double label_smoothing) {
  static const Op<&cpu::Ops::cross_entropy_backward> backward("fastnet::cross_entropy_backward");
  static const Op<&cpu::Ops::cross_entropy_backward_out> backward_into(
      "fastnet::cross_entropy_backward", "out");
  const bool is_kept = has_kept_memory(logits);
  Tensor memory = is_kept ? kept_memory().take(logits) : Tensor();
  if (memory.defined()) {
    backward_into(grad_loss, logits, target, weight, statistics, reduction, ignore_index,
                  label_smoothing, memory);
  } else {
    memory = backward(grad_loss, logits, target, weight, statistics, reduction, ignore_index,
                      label_smoothing);
  }
  return is_kept ? kept_memory().lend(memory) : memory;
}

// Saves the logits, and two numbers a row or the gradient, as the Function in
// fastnet/ops/cross_entropy.py, which does here what is not plain.
struct CrossEntropy {
  static constexpr const char* kName = "CrossEntropyBackward";
  static constexpr size_t kSaved = 5;
  using Options = std::tuple<int64_t, int64_t, double>;  // reduction, ignore_index, label_smoothing

  template <class Saved>
  static variable_list backward(const Tensor& grad_loss, const Saved& saved, const Options& options,
                                const std::vector<bool>&) {
    const Tensor gradient = saved[4];
    const auto [reduction, ignore_index, label_smoothing] = options;
    const bool is_usual = !is_differentiated() && !is_traced(grad_loss);
    // The logits may have been written to since: they are read only where there is no gradient yet,
    // or another one is wanted.
    bool has_gradient = is_usual && gradient.defined();
    if (has_gradient && is_plain(grad_loss)) {
      const double factor = grad_loss.item().toDouble();
      if (factor == 1 && !torch::autograd::get_current_graph_task_keep_graph()) return {gradient};
      has_gradient = std::isfinite(factor);
    }
    const Tensor logits = has_gradient ? Tensor() : Tensor(saved[0]);
    const Tensor target = saved[1], statistics = saved[3];
    const OptionalTensor weight = given(saved[2]);
    if (is_usual && !gradient.defined()) {
      return {cross_entropy_backward(grad_loss, logits, target, weight, statistics, reduction,
                                     ignore_index, label_smoothing)};
    }
    return from_python("cross_entropy", "gradient_of", grad_loss, given(logits), target, weight,
                       given(statistics), given(gradient), reduction, ignore_index,
                       label_smoothing);
  }
};

// Whether the forward pass makes the gradient, too. As in fastnet/ops/cross_entropy.py.
bool makes_gradient(const Tensor& logits, const Tensor& target, int64_t reduction,
                    double label_smoothing) {
  constexpr size_t kLargeOnGpu = 128 << 20;
  if (reduction == 0 || is_traced(logits)) return false;
  if (logits.is_cpu()) return is_real(logits);
  if (logits.nbytes() < kLargeOnGpu) return false;
  static const auto reads_once = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("fastnet::cross_entropy_reads_once", "")
                                     .typed<bool(const Tensor&, const Tensor&, double)>();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return reads_once.call(logits, target, label_smoothing);
}

Tensor cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                     int64_t reduction, int64_t ignore_index, double label_smoothing) {
  if (!is_trained(logits)) {
    return std::get<0>(
        cross_entropy_forward(logits, target, weight, reduction, ignore_index, label_smoothing));
  }
  Tensor loss, statistics, gradient;
  if (!makes_gradient(logits, target, reduction, label_smoothing)) {
    std::tie(loss, statistics) =
        cross_entropy_forward(logits, target, weight, reduction, ignore_index, label_smoothing);
  } else {
    std::tie(loss, gradient) = cross_entropy_with_gradient(logits, target, weight, reduction,
                                                           ignore_index, label_smoothing);
  }
  const auto save = [&](auto& node) {
    node.save({logits, target, or_undefined(weight), statistics, gradient},
              {reduction, ignore_index, label_smoothing});
  };
  record<CrossEntropy>(loss, save, logits);
  return loss;
}

// ------------------------------------------------------------------------------------------------
// conv_relu_pool

using Sizes = std::vector<int64_t>;

// Saves input, weight and a byte per pooled output: which position of its window won.
struct ConvReLUPool {
  static constexpr const char* kName = "ConvReLUPoolBackward";
  static constexpr size_t kSaved = 3;
  using Options = std::tuple<Sizes, Sizes, Sizes, int64_t>;  // stride, padding, dilation, groups

  template <class Saved>
  static variable_list backward(const Tensor& grad_output, const Saved& saved,
                                const Options& options, const std::vector<bool>& needs) {
    static const Op<&cpu::Ops::conv_relu_pool_backward> backward_op(
        "fastnet::conv_relu_pool_backward");
    const Tensor codes = saved[0], input = saved[1], weight = saved[2];
    const auto& [stride, padding, dilation, groups] = options;
    if (is_differentiated()) {
      return differentiable("conv_relu_pool", grad_output, codes, input, weight, stride, padding,
                            dilation, groups, bool(needs[0]), bool(needs[1]), bool(needs[2]));
    }
    auto [of_input, of_weight, of_bias] =
        backward_op(grad_output, codes, input, weight, stride, padding, dilation, groups, needs[0],
                    needs[1], needs[2]);
    return {of_input, of_weight, of_bias};
  }
};

Tensor conv_relu_pool(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                      int64_t groups) {
  static const Op<&cpu::Ops::conv_relu_pool_forward> forward("fastnet::conv_relu_pool_forward");
  static const Op<&cpu::Ops::conv_relu_pool_inference> inference(
      "fastnet::conv_relu_pool_inference");
  if (!is_trained(input, weight, bias)) {
    return inference(input, weight, bias, stride, padding, dilation, groups);
  }
  const auto [output, codes] = forward(input, weight, bias, stride, padding, dilation, groups);
  const auto save = [&, codes = codes](auto& node) {
    node.save({codes, input, weight}, {stride, padding, dilation, groups});
  };
  record<ConvReLUPool>(output, save, input, weight, bias);
  return output;
}

}  // namespace
}  // namespace fastnet::autograd
