// The table of contents: every op's schema.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastnet {

inline void define_schemas(torch::stable::detail::StableLibrary& library) {
  library.def("linear_relu_forward(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "linear_relu_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output, "
      "bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)");
}

}  // namespace fastnet
