// Which of Python's calls and objects are of the plain kind, asked in less than a microsecond.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <optional>

#include "op.h"

namespace fastnet::autograd {
namespace {

// Of Python's objects: torch.Tensor and torch.nn.Parameter, and no class that may know better; and
// the mode of a default device, which looks at no function of ours.
PyTypeObject* parameter_class = nullptr;
PyTypeObject* device_context_class = nullptr;

bool are_functions_watched() {
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t index = 0; index < Modes::stack_len(); ++index) {
    const PyObject* const mode = Modes::get_stack_at(index)->ptr(getPyInterpreter());
    if (Py_TYPE(mode) != device_context_class) return true;
  }
  return false;
}

// Whether calls are answered here at all. Not where forward-mode derivatives are taken, of whatever
// tensor: what comes later may have a tangent. Nor where somebody watches Python's functions.
bool is_quick() {
  return is_quiet() && !torch::autograd::ForwardADLevel::try_get_by_idx(0) &&
         !are_functions_watched();
}

// The GPUs that the CUDA kernels are for, a bit each.
std::atomic<uint64_t> cuda_devices = 0;

bool is_plain_on_gpu(const Tensor& tensor) {
  const auto devices = cuda_devices.load(std::memory_order_relaxed);
  return devices != 0 && tensor.is_cuda() && (devices >> tensor.get_device() & 1) &&
         is_plain_on<c10::DispatchKey::CUDA>(tensor);
}

// A reference of its own, as Python's object may get another tensor while others have the lock.
OptionalTensor plain(const pybind11::handle& object) {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  if (type != reinterpret_cast<PyTypeObject*>(THPVariableClass) && type != parameter_class) {
    return std::nullopt;
  }
  const Tensor& tensor = THPVariable_Unpack(object.ptr());
  const bool is_ours = is_plain(tensor) || is_plain_on_gpu(tensor);
  return is_ours ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace
}  // namespace fastnet::autograd
