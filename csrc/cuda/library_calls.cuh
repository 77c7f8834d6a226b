// Calls into NVIDIA's libraries, by way of torch, kept apart from our own kernels: only a card can
// run these.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "../common.h"

namespace fastnet {

// relu(bias + a · b) with bias and ReLU in cuBLASLt's epilogue, wherever torch finds that it can.
inline Tensor addmm_relu(const Tensor& bias, const Tensor& a, const Tensor& b) {
  AtenTensorHandle result = nullptr;
  check(aoti_torch_cuda__addmm_activation(bias.get(), a.get(), b.get(), 1.0, 1.0, /*use_gelu=*/0,
                                          &result) == 0,
        "fastnet: torch's _addmm_activation failed");
  return Tensor(result);
}

}  // namespace fastnet
