// An op, called from C++ below autograd: through the dispatcher, or past it where it has nothing to
// do but to find the CPU's kernel.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "../cpu/ops.h"

namespace fastnet::autograd {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The keys of ordinary tensors in a device's memory: none that is sparse, nested, lazily negated, a
// subclass. Those that are made in inference mode know nothing of autograd.
template <c10::DispatchKey kDevice, bool kInInferenceMode>
c10::DispatchKeySet keys_of_plain() {
  static const c10::DispatchKeySet keys = [] {
    const c10::InferenceMode mode(kInInferenceMode);  // in whatever mode the first call comes
    constexpr auto kType = kDevice == c10::DispatchKey::CPU ? at::kCPU : at::kCUDA;
    c10::Storage nothing(c10::Storage::use_byte_size_t{}, 0, at::DataPtr(nullptr, kType));
    return at::detail::make_tensor<c10::TensorImpl>(
               std::move(nothing), c10::DispatchKeySet(kDevice), caffe2::TypeMeta::Make<float>())
        .key_set();
  }();
  return keys;
}

template <c10::DispatchKey kDevice>
bool is_plain_on(const Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set();
  return keys == keys_of_plain<kDevice, false>() || keys == keys_of_plain<kDevice, true>();
}

// Whether it is one in the CPU's memory.
inline bool is_plain(const Tensor& tensor) {
  return is_plain_on<c10::DispatchKey::CPU>(tensor);
}
inline bool is_plain(const OptionalTensor& tensor) {
  return !tensor || is_plain(*tensor);
}
template <class Option>
bool is_plain(const Option&) {
  return true;
}

// Whether nothing stands between a call and the kernels: no torch.func, tracing, mode but that of
// inference. Of autocast the kernels know nothing; who is told of it casts before.
inline bool is_quiet() {
  const auto state = c10::impl::tls_local_dispatch_key_set();
  const auto excluded = state.excluded_ | c10::autocast_dispatch_keyset;
  if (state.included_ == c10::default_included_set) return excluded == c10::default_excluded_set;
  return c10::InferenceMode::is_enabled() &&
         state.included_ == c10::default_included_set.remove(c10::DispatchKey::ADInplaceOrView) &&
         excluded == (c10::default_excluded_set | c10::autograd_dispatch_keyset);
}

// And nobody is told of calls. (A profiler is told of an op by the dispatcher.)
inline bool is_unobserved() {
  return is_quiet() && !at::hasCallbacks();
}

// Between torch's tensors and those of its stable interface, which are references to them.
inline torch::stable::Tensor to_stable(const Tensor& tensor) {
  return torch::stable::Tensor(reinterpret_cast<AtenTensorHandle>(new Tensor(tensor)));
}
inline cpu::OptionalTensor to_stable(const OptionalTensor& tensor) {
  return tensor ? cpu::OptionalTensor(to_stable(*tensor)) : std::nullopt;
}
inline cpu::Sizes to_stable(at::IntArrayRef sizes) {
  return sizes.vec();
}
template <class Option>
Option to_stable(const Option& option) {
  return option;
}

inline Tensor from_stable(const torch::stable::Tensor& tensor) {
  return tensor.defined() ? *reinterpret_cast<const Tensor*>(tensor.get()) : Tensor();
}
template <class... Tensors>
auto from_stable(const std::tuple<Tensors...>& tensors) {
  return std::apply([](const auto&... each) { return std::tuple(from_stable(each)...); }, tensors);
}

// The kernels of fastnet._C, since this library was loaded.
inline const cpu::Ops* cpu_ops = nullptr;

// What the dispatcher takes for a type of cpu/ops.h.
template <class T>
struct InTorch {
  using type = T;
};
template <>
struct InTorch<torch::stable::Tensor> {
  using type = Tensor;
};
template <>
struct InTorch<const torch::stable::Tensor&> {
  using type = const Tensor&;
};
template <>
struct InTorch<const cpu::OptionalTensor&> {
  using type = const OptionalTensor&;
};
template <>
struct InTorch<const cpu::Sizes&> {
  using type = at::IntArrayRef;
};
template <class... Each>
struct InTorch<std::tuple<Each...>> {
  using type = std::tuple<typename InTorch<Each>::type...>;
};
template <class T>
using in_torch_t = typename InTorch<T>::type;

// The op whose kernel is this member of cpu::Ops: Op<&cpu::Ops::linear_relu_forward>.
template <auto Kernel, class = decltype(Kernel)>
class Op;

template <auto Kernel, class Result, class... Arguments>
class Op<Kernel, Result (*cpu::Ops::*)(Arguments...)> {
 public:
  explicit Op(const char* name, const char* overload = "")
      : handle_(c10::Dispatcher::singleton()
                    .findSchemaOrThrow(name, overload)
                    .typed<in_torch_t<Result>(in_torch_t<Arguments>...)>()) {}

  in_torch_t<Result> operator()(in_torch_t<Arguments>... arguments) const {
    const bool is_direct = (is_plain(arguments) && ...) && is_unobserved();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (!is_direct) return handle_.call(arguments...);
    if constexpr (std::is_void_v<Result>) {
      (cpu_ops->*Kernel)(to_stable(arguments)...);
    } else {
      return from_stable((cpu_ops->*Kernel)(to_stable(arguments)...));
    }
  }

 private:
  c10::TypedOperatorHandle<in_torch_t<Result>(in_torch_t<Arguments>...)> handle_;
};

}  // namespace fastnet::autograd
