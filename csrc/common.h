// What every op shares, on every device: the tensor type, checks, dtype dispatch, and the way to
// torch's own operators. Only torch's stable ABI is used, so one build serves many torch versions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace fastnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------
// Checks

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Prints as the tensor's shape. Costs nothing until it is printed.
struct ShapeOf {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& stream, const ShapeOf& shape) {
  stream << '(';
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) {
    stream << (d ? ", " : "") << shape.tensor.size(d);
  }
  return stream << ')';
}

// A failed check is a RuntimeError in Python, whose message is exactly the text given here. The
// parts are only put together when the check fails.
template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (__builtin_expect(!holds, 0)) {
    throw std::runtime_error(text(parts...));
  }
}

// What torch said last in this thread. The C interface has it from torch 2.13 on; null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// A check of a call into torch, whose own words follow: those of memory that is not there, above
// all.
template <class... Parts>
inline void check_torch(AOTITorchError error, const Parts&... parts) {
  if (__builtin_expect(error == 0, 1)) return;
  const char* said = torch_exception_get_what_without_backtrace
                         ? torch_exception_get_what_without_backtrace()
                         : nullptr;
  check(false, parts..., said ? ": " : "", said ? said : "");
}

// ---------------------------------------------------------------------------------------------
// Dtypes

// What arithmetic on T is done in: half types accumulate in float.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccumulateType<T>::type;

// Calls `body` with a value of the element type, which stands for the type only.
template <class Body>
void dispatch_float(const char* op, ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      throw std::runtime_error(text(op, ": no kernel for dtype ", dtype));
  }
}

// The same with float16, which only the CUDA kernels have.
template <class Body>
void dispatch_float_and_half(const char* op, ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::Half) {
    return body(torch::headeronly::Half{});
  }
  dispatch_float(op, dtype, std::forward<Body>(body));
}

// ---------------------------------------------------------------------------------------------
// torch's own operators

// Native operators are called below autograd: the gradient of a fastnet op is its own backward.
class NoGrad {
 public:
  NoGrad() : was_enabled_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(was_enabled_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool was_enabled_;
};

// Calls `name.overload` through the dispatcher with exactly the arguments of its schema, for an
// operator that returns one tensor. Use `.out` overloads where there is a choice: autocast leaves
// them alone, so the result has the dtype that the fastnet op promised.
template <class... Arguments>
Tensor call_native(const char* name, const char* overload, const Arguments&... arguments) {
  NoGrad no_grad;
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  const AOTITorchError error =
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION);
  check_torch(error, name, ".", overload, " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// An uninitialised tensor with the dtype (or the one named) and device of `like`. By the C
// interface, which takes a third of the dispatcher's time: at these sizes that is felt.
inline Tensor allocate_strided(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                               const int64_t* strides,
                               std::optional<ScalarType> dtype = std::nullopt) {
  int32_t like_dtype, device_type, device_index;
  aoti_torch_get_dtype(like.get(), &like_dtype);
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  if (dtype) {
    like_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  }
  AtenTensorHandle result = nullptr;
  check_torch(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                       like_dtype, device_type, device_index, &result),
              "fastnet: torch could not allocate a tensor of ", sizes.size(), " dimensions");
  return Tensor(result);
}

// The same, dense.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  constexpr size_t kInline = 8;
  std::array<int64_t, kInline> few;
  std::vector<int64_t> many(sizes.size() > kInline ? sizes.size() : 0);
  int64_t* strides = many.empty() ? few.data() : many.data();
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return allocate_strided(like, sizes, strides, dtype);
}

inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

// Uninitialised, with the layout that torch.empty_like gives: that of `like` where it is dense.
inline Tensor allocate_like(const Tensor& like) {
  return like.is_contiguous() ? allocate(like, like.sizes()) : torch::stable::empty_like(like);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace fastnet
