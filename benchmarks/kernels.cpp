// A loss and a layer forward and backward, again and again, without Python and without autograd:
// torch's operators as autograd calls them, and fastnet's as its own nodes do.
// `benchmarks/kernels.py` compiles and times it.

#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nll_loss_backward.h>
#include <ATen/ops/nll_loss_forward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../csrc/autograd/ops_with_gradients.h"

namespace {

using at::Tensor;
using fastnet::autograd::Op;
namespace cpu = fastnet::cpu;
using Tensors = std::vector<Tensor>;

constexpr int64_t kMean = 1, kIgnored = -100;

// Calls body(batch) `repeats` times, with the batches in turn. Returns the last call's result.
template <class Batch, class Body>
Tensors repeated(const std::vector<Batch>& batches, int64_t repeats, const Body& body) {
  const pybind11::gil_scoped_release no_python;
  Tensors results;
  for (int64_t i = 0; i < repeats; ++i) results = body(batches[i % batches.size()]);
  return results;
}

using Loss = std::tuple<Tensor, Tensor>;  // logits (N, C), target (N)

Tensors cross_entropy_torch(const std::vector<Loss>& batches, int64_t repeats) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor one = at::ones({});
  return repeated(batches, repeats, [&](const Loss& batch) {
    const auto& [logits, target] = batch;
    const Tensor log_p = at::_log_softmax(logits, 1, false);
    const auto [loss, total] = at::nll_loss_forward(log_p, target, {}, kMean, kIgnored);
    const Tensor grad = at::nll_loss_backward(one, log_p, target, {}, kMean, kIgnored, total);
    return Tensors{loss, at::_log_softmax_backward_data(grad, log_p, 1, logits.scalar_type())};
  });
}

Tensors cross_entropy_fastnet(const std::vector<Loss>& batches, int64_t repeats) {
  return repeated(batches, repeats, [&](const Loss& batch) {
    const auto& [logits, target] = batch;
    const auto [loss, gradient] =
        fastnet::autograd::cross_entropy_with_gradient(logits, target, {}, kMean, kIgnored, 0.0);
    return Tensors{loss, gradient};
  });
}

using Layer = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // input, weight, bias, grad_output

Tensors linear_relu_torch(const std::vector<Layer>& batches, bool needs_input, int64_t repeats) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return repeated(batches, repeats, [&](const Layer& batch) {
    const auto& [input, weight, bias, grad_output] = batch;
    const Tensor output = at::relu(at::addmm(bias, input, weight.t()));
    const Tensor grad = at::threshold_backward(grad_output, output, 0);
    Tensors results{output, grad.t().mm(input), grad.sum(0)};
    if (needs_input) results.push_back(grad.mm(weight));
    return results;
  });
}

Tensors linear_relu_fastnet(const std::vector<Layer>& batches, bool needs_input, int64_t repeats) {
  static const Op<&cpu::Ops::linear_relu_forward> forward("fastnet::linear_relu_forward");
  static const Op<&cpu::Ops::linear_relu_backward> backward("fastnet::linear_relu_backward");
  return repeated(batches, repeats, [&](const Layer& batch) {
    const auto& [input, weight, bias, grad_output] = batch;
    const Tensor output = forward(input, weight, bias);
    const auto [grad_input, grad_weight, grad_bias] =
        backward(grad_output, output, input,
                 needs_input ? std::optional<Tensor>(weight) : std::nullopt, true);
    Tensors results{output, grad_weight, grad_bias};
    if (needs_input) results.push_back(grad_input);
    return results;
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  fastnet::autograd::cpu_ops =
      static_cast<const cpu::Ops*>(PyCapsule_Import(cpu::kOpsCapsule, /*no_block=*/0));
  if (!fastnet::autograd::cpu_ops) throw pybind11::error_already_set();
  module.def("cross_entropy_torch", &cross_entropy_torch);
  module.def("cross_entropy_fastnet", &cross_entropy_fastnet);
  module.def("linear_relu_torch", &linear_relu_torch);
  module.def("linear_relu_fastnet", &linear_relu_fastnet);
}
