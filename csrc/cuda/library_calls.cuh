// Calls into NVIDIA's libraries, by way of torch, kept apart from our own kernels: only a card can
// run these. Under emulation torch's CPU operator of the same name stands in.
#pragma once

#if defined(FASTNET_EMULATION)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

#include <mutex>

#include "../common.h"

namespace fastnet {

// relu(bias + a · b) with bias and ReLU in cuBLASLt's epilogue, wherever torch finds that it can.
inline Tensor addmm_relu(const Tensor& bias, const Tensor& a, const Tensor& b) {
#if defined(FASTNET_EMULATION)
  const auto addmm_activation = aoti_torch_cpu__addmm_activation;
#else
  const auto addmm_activation = aoti_torch_cuda__addmm_activation;
#endif
  AtenTensorHandle result = nullptr;
  check_torch(addmm_activation(bias.get(), a.get(), b.get(), 1.0, 1.0, /*use_gelu=*/0, &result),
              "fastnet: torch's _addmm_activation failed");
  return Tensor(result);
}

// For library_convolution and library_convolution_backward.
#if defined(FASTNET_EMULATION)
inline constexpr auto* device_convolution = aoti_torch_cpu_convolution;
inline constexpr auto* device_convolution_backward = aoti_torch_cpu_convolution_backward;
#else
inline constexpr auto* device_convolution = aoti_torch_cuda_convolution;
inline constexpr auto* device_convolution_backward = aoti_torch_cuda_convolution_backward;
#endif

// While one lives, cuDNN is asked for algorithms that give the same bits every time. The switch is
// process-wide, and no part of torch's stable ABI: where these names are gone, it stays as it is.
// Backward passes of several devices run on a thread each: the first of those that are under way
// together turns the switch on, and the last one puts it back.
#if defined(FASTNET_EMULATION)
struct DeterministicLibrary {
  ~DeterministicLibrary() {}
};
#else
#define FASTNET_WEAK(name) __asm__(name) __attribute__((weak))
void* torch_context() FASTNET_WEAK("_ZN2at13globalContextEv");
bool torch_is_deterministic(const void* context)
    FASTNET_WEAK("_ZNK2at7Context18deterministicCuDNNEv");
void torch_set_deterministic(void* context, bool on)
    FASTNET_WEAK("_ZN2at7Context21setDeterministicCuDNNEb");
#undef FASTNET_WEAK

class DeterministicLibrary {
 public:
  DeterministicLibrary() {
    if (!is_there()) return;
    Users& users = all_users();
    const std::lock_guard lock(users.mutex);
    if (users.count++ > 0) return;
    users.was_on = torch_is_deterministic(torch_context());
    if (!users.was_on) torch_set_deterministic(torch_context(), true);
  }
  ~DeterministicLibrary() {
    if (!is_there()) return;
    Users& users = all_users();
    const std::lock_guard lock(users.mutex);
    if (--users.count == 0 && !users.was_on) torch_set_deterministic(torch_context(), false);
  }
  DeterministicLibrary(const DeterministicLibrary&) = delete;
  DeterministicLibrary& operator=(const DeterministicLibrary&) = delete;

 private:
  struct Users {
    std::mutex mutex;
    int count = 0;
    bool was_on = true;
  };
  static Users& all_users() {
    static Users users;
    return users;
  }
  static bool is_there() {
    return torch_context && torch_is_deterministic && torch_set_deterministic;
  }
};
#endif

}  // namespace fastnet
