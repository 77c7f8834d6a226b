"""linear_relu: relu(input @ weight.T + bias)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnet import _library  # noqa: F401  registers torch.ops.fastnet

_forward = torch.ops.fastnet.linear_relu_forward.default
_backward = torch.ops.fastnet.linear_relu_backward.default


@torch.library.register_fake("fastnet::linear_relu_forward")
def fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(
        input.shape[-1] == weight.shape[1],
        lambda: (
            f"linear_relu: input {tuple(input.shape)} does not fit weight {tuple(weight.shape)}"
        ),
    )
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("fastnet::linear_relu_backward")
def fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        input.new_empty(input.shape) if needs_input else None,
        weight.new_empty(weight.shape) if needs_weight else None,
        weight.new_empty(weight.shape[:1]) if needs_bias else None,
    )


class LinearReLU(torch.autograd.Function):
    """Saves input, weight and output: the output's sign is the ReLU's mask.

    In the style with one `forward(ctx, ...)`: a separate `setup_context` costs 40 µs more a call,
    four times the rest. torch.func, which would need it, is given the native operators.
    """

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = _forward(input, weight, bias)
        ctx.save_for_backward(input, weight, output)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        input, weight, output = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return _backward(
                grad_output, input, weight, output, needs_input, needs_weight, needs_bias
            )
        # Somebody wants to differentiate the gradient: native operators, which torch can.
        grad_z = torch.ops.aten.threshold_backward(grad_output, output, 0)
        rows = grad_z.reshape(-1, weight.shape[0])
        return (
            grad_z @ weight if needs_input else None,
            rows.t() @ input.reshape(-1, weight.shape[1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
