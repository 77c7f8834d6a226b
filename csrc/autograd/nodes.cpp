// The ops' nodes in autograd's graph, in C++: the same as the autograd.Functions in fastnet/ops,
// and some 30 µs quicker in each step, which is a third of what a small layer takes.
//
// This is the one library that is not built on torch's stable ABI, which knows nothing of autograd.
// It serves the torch that it was compiled with (see fastnet/_library.py); under any other one, and
// wherever torch.compile is at work, the Functions in Python do the same.

#include <ATen/autocast_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops_with_gradients.h"
#include "optimizers.h"
#include "quick.h"

namespace fastnet::autograd {
namespace {

// What fastnet/functional.py asks before it calls a kernel takes ten microseconds there, as long as
// the kernel of a small layer. Here it takes less than one. `quick_*` answer None where a call is
// not of the plain kind, and leave it to that file.

template <class Call>
pybind11::object wrapped(const Call& call) {
  Tensor result;
  {
    const pybind11::gil_scoped_release other_threads_go_on;
    result = call();
  }
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(result)));
}

bool has_kernels(at::ScalarType dtype, const Tensor& tensor) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         (dtype == at::kHalf && tensor.is_cuda());
}

bool is_autocast(const Tensor& tensor) {
  return at::autocast::is_autocast_enabled(tensor.device().type());
}

// What autocast makes of a tensor before a product or a convolution.
at::ScalarType autocast_dtype(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  const bool is_cast = is_autocast(tensor) && tensor.is_floating_point() && dtype != at::kDouble;
  return is_cast ? at::autocast::get_autocast_dtype(tensor.device().type()) : dtype;
}
Tensor autocast(const Tensor& tensor) {
  const auto dtype = autocast_dtype(tensor);
  return tensor.scalar_type() == dtype
             ? tensor
             : at::autocast::cached_cast(dtype, tensor, tensor.device().type());
}
OptionalTensor autocast(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(autocast(*tensor)) : std::nullopt;
}

// Whether these are on one device, and have one dtype in the end, which the kernels take. The
// weight has dimensions.
bool fit_together(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const auto dtype = autocast_dtype(input);
  const auto fits = [&](const Tensor& tensor) {
    return tensor.device() == input.device() && autocast_dtype(tensor) == dtype;
  };
  return has_kernels(dtype, input) && fits(weight) &&
         (!bias || (fits(*bias) && bias->dim() == 1 && bias->size(0) == weight.size(0)));
}

// Calls call(input, weight, bias), three tensors that make a linear layer.
template <class Call>
pybind11::object quick_layer(const pybind11::handle& input, const pybind11::handle& weight,
                             const pybind11::handle& bias, const Call& call) {
  const OptionalTensor x = plain(input), w = plain(weight);
  const OptionalTensor b = bias.is_none() ? std::nullopt : plain(bias);
  if (!is_quick() || !x || !w || (!b && !bias.is_none()) || x->dim() == 0 || w->dim() != 2 ||
      !fit_together(*x, *w, b)) {
    return pybind11::none();
  }
  return call(*x, *w, b);
}

pybind11::object quick_linear_relu(const pybind11::handle& input, const pybind11::handle& weight,
                                   const pybind11::handle& bias) {
  return quick_layer(input, weight, bias, [](const auto& x, const auto& w, const auto& b) {
    return wrapped([&] { return linear_relu(autocast(x), autocast(w), autocast(b)); });
  });
}

pybind11::object quick_linear(const pybind11::handle& input, const pybind11::handle& weight,
                              const pybind11::handle& bias) {
  return quick_layer(
      input, weight, bias, [](const auto& x, const auto& w, const auto& b) -> pybind11::object {
        if (!x.is_cpu() || !prefers_own_linear(x, w, autocast_dtype(x))) return pybind11::none();
        return wrapped([&] { return own_linear(autocast(x), autocast(w), autocast(b)); });
      });
}

// One number for height and width, or one for each: two of Python's own integers.
std::optional<Sizes> plain_pair(const pybind11::handle& object) {
  const auto number = [](PyObject* item) {
    return PyLong_CheckExact(item) ? PyLong_AsLong(item) : -1;
  };
  PyObject* const value = object.ptr();
  const bool is_pair = PyTuple_CheckExact(value) && PyTuple_GET_SIZE(value) == 2;
  const Sizes pair =
      is_pair ? Sizes{number(PyTuple_GET_ITEM(value, 0)), number(PyTuple_GET_ITEM(value, 1))}
              : Sizes{number(value), number(value)};
  if (PyErr_Occurred()) PyErr_Clear();  // too large for a long: -1, too
  return pair[0] >= 0 && pair[1] >= 0 ? std::optional(pair) : std::nullopt;
}

// Of images in a batch, pooled by windows of 2 x 2 side by side.
pybind11::object quick_conv_relu_pool(
    const pybind11::handle& input, const pybind11::handle& weight, const pybind11::handle& bias,
    const pybind11::handle& stride, const pybind11::handle& padding,
    const pybind11::handle& dilation, const pybind11::handle& groups,
    const pybind11::handle& pool_kernel_size, const pybind11::handle& pool_stride,
    const pybind11::handle& pool_padding, const pybind11::handle& ceil_mode) {
  const OptionalTensor x = plain(input), w = plain(weight);
  const OptionalTensor b = bias.is_none() ? std::nullopt : plain(bias);
  if (!is_quick() || !x || !w || (!b && !bias.is_none()) || x->dim() != 4 || w->dim() != 4 ||
      w->numel() == 0 || !fit_together(*x, *w, b)) {
    return pybind11::none();
  }
  const auto windows = plain_pair(pool_kernel_size), around = plain_pair(pool_padding);
  const auto apart = pool_stride.is_none() ? windows : plain_pair(pool_stride);
  const auto strides = plain_pair(stride), paddings = plain_pair(padding);
  const auto dilations = plain_pair(dilation);
  const Sizes two{2, 2}, zero{0, 0};
  if (windows != two || apart != two || around != zero || !strides || !paddings || !dilations ||
      !PyLong_CheckExact(groups.ptr()) || !PyBool_Check(ceil_mode.ptr())) {
    return pybind11::none();
  }
  const auto parts = plain_pair(groups).value_or(zero)[0];
  if (parts < 1 || w->size(0) % parts != 0 || x->size(1) != w->size(1) * parts) {
    return pybind11::none();
  }
  for (int d = 0; d < 2; ++d) {
    const int64_t size = x->size(2 + d), reach = (*dilations)[d] * (w->size(2 + d) - 1);
    if (size == 0 || (*strides)[d] < 1 || (*dilations)[d] < 1) return pybind11::none();
    const int64_t room = size + 2 * (*paddings)[d] - reach - 1;
    const int64_t convolved = room < 0 ? 0 : room / (*strides)[d] + 1;
    if (convolved < 2 || (ceil_mode.ptr() == Py_True && convolved % 2 != 0)) {
      return pybind11::none();
    }
  }
  return wrapped([&] {
    return conv_relu_pool(autocast(*x), autocast(*w), autocast(b), *strides, *paddings, *dilations,
                          parts);
  });
}

// Of two-dimensional logits and class indices, without class weights.
pybind11::object quick_cross_entropy(const pybind11::handle& input, const pybind11::handle& target,
                                     int64_t reduction, const pybind11::handle& ignore_index,
                                     const pybind11::handle& label_smoothing) {
  if (!PyLong_CheckExact(ignore_index.ptr()) || !PyFloat_CheckExact(label_smoothing.ptr())) {
    return pybind11::none();
  }
  const long long ignored = PyLong_AsLongLong(ignore_index.ptr());
  if (PyErr_Occurred()) {  // too large
    PyErr_Clear();
    return pybind11::none();
  }
  const auto smoothing = label_smoothing.cast<double>();
  const OptionalTensor x = plain(input), t = plain(target);
  if (!is_quick() || !x || !t || t->device() != x->device() || !has_kernels(x->scalar_type(), *x) ||
      x->dim() != 2 || x->numel() == 0 || t->scalar_type() != at::kLong || t->dim() != 1 ||
      t->size(0) != x->size(0) || !(smoothing >= 0 && smoothing <= 1)) {
    return pybind11::none();
  }
  return wrapped([&] {
    const Tensor loss = cross_entropy(*x, *t, std::nullopt, reduction, ignored, smoothing);
    // The kernels sum half types in float32, which is what autocast wants.
    return is_autocast(*x) ? loss : loss.to(x->scalar_type());
  });
}

}  // namespace
}  // namespace fastnet::autograd

PYBIND11_MODULE(_nodes, module) {
  module.doc() = "The nodes of fastnet's ops in autograd's graph, for one version of torch.";
  const auto class_of = [](const char* home, const char* name) {
    return reinterpret_cast<PyTypeObject*>(pybind11::module_::import(home).attr(name).ptr());
  };
  fastnet::autograd::parameter_class = class_of("torch.nn", "Parameter");
  fastnet::autograd::device_context_class = class_of("torch.utils._device", "DeviceContext");
  fastnet::autograd::cpu_ops =
      static_cast<const fastnet::cpu::Ops*>(PyCapsule_Import(fastnet::cpu::kOpsCapsule, 0));
  if (!fastnet::autograd::cpu_ops) throw pybind11::error_already_set();
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.def("linear_relu", &fastnet::autograd::linear_relu, Unlocked());
  module.def("cross_entropy", &fastnet::autograd::cross_entropy, Unlocked());
  module.def("conv_relu_pool", &fastnet::autograd::conv_relu_pool, Unlocked());
  module.def("take_cuda", [](int device) {
    if (device >= 0 && device < 64) fastnet::autograd::cuda_devices |= uint64_t{1} << device;
  });
  module.def("release_memory", [] { fastnet::autograd::kept_memory().release(); });
  module.def("optimizer_step", &fastnet::autograd::optimizer_step);
  module.def("is_observed", [] { return at::hasCallbacks(); });
  module.def("quick_linear_relu", &fastnet::autograd::quick_linear_relu);
  module.def("quick_linear", &fastnet::autograd::quick_linear);
  module.def("quick_conv_relu_pool", &fastnet::autograd::quick_conv_relu_pool);
  module.def("quick_cross_entropy", &fastnet::autograd::quick_cross_entropy);
}
