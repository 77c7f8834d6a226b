"""linear_relu: relu(input @ weight.T + bias)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnet import _library

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
    output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    N = output.shape[-1]
    return (
        None if weight is None else output.new_empty((*output.shape[:-1], weight.shape[1])),
        None if input is None else output.new_empty((N, input.shape[-1])),
        output.new_empty((N,)) if needs_bias else None,
    )


def apply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op with its gradients."""
    if _library.NODES is not None and not torch.compiler.is_compiling():
        return _library.NODES.linear_relu(input, weight, bias)
    if _library.is_recorded():
        return LinearReLU.apply(input, weight, bias)
    return _forward(input, weight, bias)


class LinearReLU(torch.autograd.Function):
    """Saves the output, whose sign is the ReLU's mask, and the factors that a gradient needs.

    In the style with one `forward(ctx, ...)`: a separate `setup_context` costs 40 µs more a call,
    four times the rest. torch.func, which would need it, is given the native operators.
    """

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = _forward(input, weight, bias)
        needs_input, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            output, input if needs_weight else None, weight if needs_input else None
        )
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        output, input, weight = ctx.saved_tensors
        needs_bias = ctx.needs_input_grad[2]
        if _library.is_differentiated():
            return differentiate(grad_output, output, input, weight, needs_bias)
        return _backward(grad_output, output, input, weight, needs_bias)


def differentiate(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients, where somebody wants to differentiate them, or to map over them: by native
    operators, which torch knows how to."""
    grad_z = torch.ops.aten.threshold_backward(grad_output, output, 0)
    M, N = math.prod(output.shape[:-1]), output.shape[-1]
    rows = grad_z.reshape(M, N)
    return (
        None if weight is None else grad_z @ weight,
        None if input is None else rows.t() @ input.reshape(M, input.shape[-1]),
        rows.sum(0) if needs_bias else None,
    )
