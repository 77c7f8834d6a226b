// A step of fastnet/optim.py's optimizers: of all parameters in one call, without torch's
// operators.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "quick.h"

namespace fastnet::autograd {
namespace {

// Whether it is a float32 tensor in the CPU's memory, with elements where `like` has its own.
bool fits(const Tensor& tensor, const Tensor& like) {
  return is_plain(tensor) && !tensor.is_inference() && tensor.scalar_type() == at::kFloat &&
         tensor.sizes() == like.sizes() && tensor.strides() == like.strides();
}

// What an optimizer keeps under that name of a parameter; undefined where there is no tensor of
// torch's own.
Tensor kept(PyObject* state, const char* name) {
  PyObject* const value = PyDict_GetItemString(state, name);  // borrowed
  return value && THPVariable_CheckExact(value) ? THPVariable_Unpack(value) : Tensor();
}

// Whether float32 has a number for it.
bool is_float(double number) {
  return !std::isfinite(number) || std::isfinite(static_cast<float>(number));
}

// One of Python's own numbers, no tensor.
double number_of(const pybind11::handle& object) {
  const bool is_number = PyFloat_Check(object.ptr()) || PyLong_Check(object.ptr());
  const double number = is_number ? PyFloat_AsDouble(object.ptr()) : -1;
  if (!is_number || (number == -1 && PyErr_Occurred())) {  // too large
    PyErr_Clear();
    throw pybind11::cast_error("no number");
  }
  return number;
}

// The numbers of a group of parameters, in the order in which fastnet/optim.py has them.
struct GroupNumbers {
  OptimizerKind kind;
  double lr, beta1, beta2, eps, weight_decay;
  bool is_decoupled, is_nesterov;

  explicit GroupNumbers(const pybind11::tuple& given)
      : kind(static_cast<OptimizerKind>(given[0].cast<int64_t>())),
        lr(number_of(given[1])),
        beta1(number_of(given[2])),
        beta2(number_of(given[3])),
        eps(number_of(given[4])),
        weight_decay(number_of(given[5])),
        is_decoupled(given[6].cast<bool>()),
        is_nesterov(given[7].cast<bool>()) {}

  // Whether a step with them, of that number, is one that torch takes, too.
  bool are_usual(double number) const {
    const bool are_floats =
        is_float(lr) && is_float(beta1) && is_float(eps) && is_float(weight_decay);
    const bool is_corrected =
        number >= 1 && std::pow(beta1, number) < 1 && std::pow(beta2, number) < 1;
    return are_floats && (kind != OptimizerKind::adam || is_corrected);
  }

  OptimizerStep step(double number) const {
    return corrected_step(kind, lr, beta1, beta2, eps, is_decoupled ? 0 : weight_decay, number);
  }
};

// A parameter with its gradient, and its state; undefined where that optimizer has none.
struct Stepped {
  size_t group;
  Tensor weight, gradient, first, second, count;

  static float* memory(const Tensor& tensor) {
    return tensor.defined() ? static_cast<float*>(tensor.mutable_data_ptr()) : nullptr;
  }

  // From here on no Python runs that could put something else in a tensor's place.
  OptimizedTensor tensor(const GroupNumbers& numbers, const OptimizerStep& step) const {
    const double shrink = numbers.is_decoupled ? 1 - numbers.lr * numbers.weight_decay : 1;
    return {.kind = numbers.kind,
            .step = step,
            .shrink = static_cast<float>(shrink),
            .is_nesterov = numbers.is_nesterov,
            .weight = memory(weight),
            .gradient = static_cast<const float*>(gradient.const_data_ptr()),
            .first = memory(first),
            .second = memory(second),
            .count = weight.numel()};
  }

  // Whatever autograd has saved of what was written to is no longer what it was.
  void bump_versions() const {
    for (const Tensor* tensor : {&weight, &first, &second, &count}) {
      if (tensor->defined()) tensor->unsafeGetTensorImpl()->bump_version();
    }
  }
};

// Adds a parameter of a group, or nothing where it has no gradient. False where it cannot be
// stepped here.
bool add_parameter(const pybind11::handle& parameter, PyObject* state, size_t group,
                   OptimizerKind kind, std::vector<Stepped>& stepped) {
  const OptionalTensor weight = plain(parameter);
  if (!weight || !weight->is_leaf() || !fits(*weight, *weight) ||
      !weight->is_non_overlapping_and_dense()) {
    return false;
  }
  Stepped now{group, *weight, weight->grad(), {}, {}, {}};
  if (!now.gradient.defined()) return true;
  if (!fits(now.gradient, *weight)) return false;
  if (kind != OptimizerKind::sgd) {
    // Before its first step a parameter has no state: torch makes it.
    PyObject* const own = PyDict_GetItemWithError(state, parameter.ptr());  // borrowed
    if (!own && PyErr_Occurred()) throw pybind11::error_already_set();
    if (!own || !PyDict_Check(own)) return false;
    const bool is_adam = kind == OptimizerKind::adam;
    now.first = kept(own, is_adam ? "exp_avg" : "momentum_buffer");
    if (!now.first.defined() || !fits(now.first, *weight)) return false;
    if (is_adam) {
      now.second = kept(own, "exp_avg_sq");
      now.count = kept(own, "step");
      if (!now.second.defined() || !fits(now.second, *weight) || !now.count.defined() ||
          !fits(now.count, now.count) || now.count.numel() != 1) {
        return false;
      }
    }
  }
  stepped.push_back(std::move(now));
  return true;
}

// Whether anything that is written to lies in the memory of something else.
bool do_overlap(const std::vector<Stepped>& stepped) {
  struct Range {
    const float *begin, *end;
    bool is_written;
  };
  std::vector<Range> ranges;
  ranges.reserve(5 * stepped.size());
  for (const Stepped& each : stepped) {
    for (const Tensor* tensor :
         {&each.weight, &each.gradient, &each.first, &each.second, &each.count}) {
      if (!tensor->defined() || tensor->numel() == 0) continue;
      const auto* const begin = static_cast<const float*>(tensor->const_data_ptr());
      ranges.push_back({begin, begin + tensor->numel(), tensor != &each.gradient});
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  const float *end = nullptr, *end_of_written = nullptr;
  for (const Range& range : ranges) {
    if (range.begin < (range.is_written ? end : end_of_written)) return true;
    end = std::max(end, range.end);
    if (range.is_written) end_of_written = std::max(end_of_written, range.end);
  }
  return false;
}

// Takes a step: of each group (parameters, numbers). Changes nothing and says false where any of it
// is not of the plain kind, and torch's own step has to do it.
bool optimizer_step(const pybind11::list& groups, const pybind11::handle& state) {
  if (!is_quick() || !PyDict_Check(state.ptr())) return false;
  std::vector<GroupNumbers> numbers;
  std::vector<Stepped> stepped;
  try {
    for (const auto& item : groups) {
      const auto group = item.cast<pybind11::tuple>();
      numbers.emplace_back(group[1].cast<pybind11::tuple>());
      const pybind11::object parameters = group[0];
      for (const auto& parameter : parameters) {
        if (!add_parameter(parameter, state.ptr(), numbers.size() - 1, numbers.back().kind,
                           stepped)) {
          return false;
        }
      }
    }
  } catch (const pybind11::cast_error&) {  // of which torch says more
    return false;
  }
  std::vector<OptimizedTensor> tensors;
  tensors.reserve(stepped.size());
  OptimizerStep step{};
  std::pair<size_t, double> of_step{};  // a group, and which of its steps: mostly the same for all
  for (const Stepped& each : stepped) {
    const GroupNumbers& its = numbers[each.group];
    const float* const count = Stepped::memory(each.count);
    const std::pair<size_t, double> of_this{each.group, count ? *count + 1.0 : 1.0};
    if (tensors.empty() || of_this != of_step) {
      if (!its.are_usual(of_this.second)) return false;
      step = its.step(of_this.second);
      of_step = of_this;
    }
    tensors.push_back(each.tensor(its, step));
  }
  if (do_overlap(stepped)) return false;
  const pybind11::gil_scoped_release other_threads_go_on;
  cpu_ops->apply_optimizer(tensors);
  for (const Stepped& each : stepped) {
    if (float* const count = Stepped::memory(each.count)) ++*count;
    each.bump_versions();
  }
  return true;
}

}  // namespace
}  // namespace fastnet::autograd
