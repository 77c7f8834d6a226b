"""linear: input @ weight.T + bias, on the CPU, where that is quicker than torch's own. Its node in
autograd's graph is in C++ alone (csrc/autograd); elsewhere `fastnet.functional.linear` is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnet.ops import linear_relu


@torch.library.register_fake("fastnet::linear_forward")
def fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_relu.fake_forward(input, weight, bias)


@torch.library.register_fake("fastnet::linear_backward")
def fake_backward(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return linear_relu.fake_backward(grad_output, grad_output, input, weight, needs_bias)


@torch.library.register_fake("fastnet::linear_forward.out")
def fake_forward_out(*arguments, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastnet::linear_backward.out")
def fake_backward_out(*arguments, grad_input: Tensor | None, grad_weight: Tensor | None) -> None:
    return None
