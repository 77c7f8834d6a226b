// A step of fastnet/optim.py's optimizers: of all parameters in one call, without torch's
// operators.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "quick.h"

namespace fastnet::autograd {
namespace {

// Whether it is a float32 tensor in the CPU's memory, with elements where `like` has its own.
bool fits(const Tensor& tensor, const Tensor& like) {
  return is_plain(tensor) && !tensor.is_inference() && tensor.scalar_type() == at::kFloat &&
         tensor.sizes() == like.sizes() && tensor.strides() == like.strides();
}

// What an optimizer keeps under that name of a parameter; undefined where there is none.
Tensor kept(const pybind11::dict& state, const char* name) {
  PyObject* const value = PyDict_GetItemString(state.ptr(), name);  // borrowed
  return value && THPVariable_Check(value) ? THPVariable_Unpack(value) : Tensor();
}

// A parameter with its gradient, and its state; undefined where that optimizer has none.
struct Stepped {
  Tensor weight, gradient, first, second, count;

  // Whatever autograd has saved of what was written to is no longer what it was.
  void bump_versions() const {
    for (const Tensor* tensor : {&weight, &first, &second, &count}) {
      if (tensor->defined()) tensor->unsafeGetTensorImpl()->bump_version();
    }
  }
};

// The numbers of a group of parameters, in the order in which fastnet/optim.py has them.
struct GroupNumbers {
  OptimizerKind kind;
  double lr, beta1, beta2, eps, weight_decay;
  bool is_decoupled, is_nesterov;

  explicit GroupNumbers(const pybind11::tuple& given)
      : kind(static_cast<OptimizerKind>(given[0].cast<int64_t>())),
        lr(given[1].cast<double>()),
        beta1(given[2].cast<double>()),
        beta2(given[3].cast<double>()),
        eps(given[4].cast<double>()),
        weight_decay(given[5].cast<double>()),
        is_decoupled(given[6].cast<bool>()),
        is_nesterov(given[7].cast<bool>()) {}

  // Step `number`, which is mostly that of the parameter before, too.
  const OptimizerStep& step(double number) {
    if (number != last_number) {
      last = optimizer_step(lr, beta1, beta2, eps, is_decoupled ? 0 : weight_decay);
      if (kind == OptimizerKind::adam) correct(last, lr, beta1, beta2, number);
      last_number = number;
    }
    return last;
  }

  double last_number = 0;
  OptimizerStep last{};
};

// Adds what a step of the parameter works on. False where it cannot be done here; a parameter
// without a gradient is left out.
bool add_parameter(const pybind11::handle& parameter, const pybind11::dict& state,
                   GroupNumbers& numbers, std::vector<Stepped>& stepped,
                   std::vector<OptimizedTensor>& tensors) {
  const OptionalTensor weight = plain(parameter);
  if (!weight || !weight->is_leaf() || !fits(*weight, *weight) ||
      !weight->is_non_overlapping_and_dense()) {
    return false;
  }
  const Tensor& gradient = weight->grad();
  if (!gradient.defined()) return true;
  if (!fits(gradient, *weight)) return false;
  Stepped now{*weight, gradient, {}, {}, {}};
  if (numbers.kind != OptimizerKind::sgd) {
    // Before its first step a parameter has no state: torch makes it.
    PyObject* const own = PyDict_GetItemWithError(state.ptr(), parameter.ptr());  // borrowed
    if (!own && PyErr_Occurred()) throw pybind11::error_already_set();
    if (!own || !PyDict_Check(own)) return false;
    const auto of_parameter = pybind11::reinterpret_borrow<pybind11::dict>(own);
    const bool is_adam = numbers.kind == OptimizerKind::adam;
    now.first = kept(of_parameter, is_adam ? "exp_avg" : "momentum_buffer");
    if (!now.first.defined() || !fits(now.first, *weight)) return false;
    if (is_adam) {
      now.second = kept(of_parameter, "exp_avg_sq");
      now.count = kept(of_parameter, "step");
      if (!now.second.defined() || !fits(now.second, *weight) || !now.count.defined() ||
          !fits(now.count, now.count) || now.count.numel() != 1) {
        return false;
      }
    }
  }
  const auto memory = [](const Tensor& tensor) {
    return tensor.defined() ? static_cast<float*>(tensor.mutable_data_ptr()) : nullptr;
  };
  const float* const count = memory(now.count);
  tensors.push_back({
      .kind = numbers.kind,
      .step = numbers.step(count ? *count + 1.0 : 1.0),
      .shrink =
          static_cast<float>(numbers.is_decoupled ? 1 - numbers.lr * numbers.weight_decay : 1),
      .is_nesterov = numbers.is_nesterov,
      .weight = memory(now.weight),
      .gradient = static_cast<const float*>(gradient.const_data_ptr()),
      .first = memory(now.first),
      .second = memory(now.second),
      .count = weight->numel(),
  });
  stepped.push_back(std::move(now));
  return true;
}

// Whether some of the weights lie in the same memory, which several threads must not write to.
bool do_overlap(std::vector<OptimizedTensor> tensors) {
  std::sort(tensors.begin(), tensors.end(),
            [](const auto& a, const auto& b) { return a.weight < b.weight; });
  const float* end = nullptr;
  for (const auto& tensor : tensors) {
    if (tensor.count > 0 && tensor.weight < end) return true;
    end = std::max(end, static_cast<const float*>(tensor.weight) + tensor.count);
  }
  return false;
}

// Takes a step: of each group (parameters, numbers). Changes nothing and says false where any of it
// is not of the plain kind, and torch's own step has to do it.
bool optimizer_step(const pybind11::list& groups, const pybind11::dict& state) {
  if (!is_quick()) return false;
  std::vector<Stepped> stepped;
  std::vector<OptimizedTensor> tensors;
  for (const auto& item : groups) {
    const auto group = item.cast<pybind11::tuple>();
    GroupNumbers numbers(group[1].cast<pybind11::tuple>());
    const pybind11::object parameters = group[0];
    for (const auto& parameter : parameters) {
      if (!add_parameter(parameter, state, numbers, stepped, tensors)) return false;
    }
  }
  if (do_overlap(tensors)) return false;
  const pybind11::gil_scoped_release other_threads_go_on;
  cpu_ops->apply_optimizer(tensors);
  for (const Stepped& each : stepped) {
    if (each.count.defined()) ++*static_cast<float*>(each.count.mutable_data_ptr());
    each.bump_versions();
  }
  return true;
}

}  // namespace
}  // namespace fastnet::autograd
