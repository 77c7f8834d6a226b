// Calls into NVIDIA's libraries, by way of torch, kept apart from our own kernels: only a card can
// run these. Under emulation torch's CPU operator of the same name stands in.
#pragma once

#if defined(FASTNET_EMULATION)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

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
  check(addmm_activation(bias.get(), a.get(), b.get(), 1.0, 1.0, /*use_gelu=*/0, &result) == 0,
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

}  // namespace fastnet
