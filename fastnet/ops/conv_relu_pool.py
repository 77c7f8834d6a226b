"""conv_relu_pool: max_pool2d(relu(conv2d(input, weight, bias)), 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnet import _library

_forward = torch.ops.fastnet.conv_relu_pool_forward.default
_inference = torch.ops.fastnet.conv_relu_pool_inference.default
_backward = torch.ops.fastnet.conv_relu_pool_backward.default


def convolved_size(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of a convolution's output."""
    return [
        (size + 2 * padding[d] - dilation[d] * (kernel - 1) - 1) // stride[d] + 1
        for d, (size, kernel) in enumerate(zip(input.shape[-2:], weight.shape[2:], strict=True))
    ]


@torch.library.register_fake("fastnet::conv_relu_pool_forward")
def fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    torch._check(
        input.shape[1] == weight.shape[1] * groups,
        lambda: (
            f"conv_relu_pool: input {tuple(input.shape)} does not fit weight {tuple(weight.shape)}"
        ),
    )
    size = [s // 2 for s in convolved_size(input, weight, stride, padding, dilation)]
    like_input = torch._prims_common.suggest_memory_format(input)
    like_weight = torch._prims_common.suggest_memory_format(weight)
    is_last = torch.channels_last in (like_input, like_weight) and weight.shape[0] > 1
    shape = (input.shape[0], weight.shape[0], *size)
    output = input.new_empty(shape)
    if is_last:
        output = input.new_empty((shape[0], *size, shape[1])).permute(0, 3, 1, 2)
    return output, torch.empty_like(output, dtype=torch.uint8)


@torch.library.register_fake("fastnet::conv_relu_pool_inference")
def fake_inference(
    input: Tensor, weight: Tensor, bias: Tensor | None, *convolution: Sequence[int] | int
) -> Tensor:
    return fake_forward(input, weight, bias, *convolution)[0]


@torch.library.register_fake("fastnet::conv_relu_pool_backward")
def fake_backward(
    grad_output: Tensor,
    codes: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        torch.empty_like(input) if needs_input else None,
        torch.empty_like(weight) if needs_weight else None,
        weight.new_empty(weight.shape[:1]) if needs_bias else None,
    )


def apply(
    input: Tensor, weight: Tensor, bias: Tensor | None, *convolution: Sequence[int] | int
) -> Tensor:
    """The op with its gradients; where none will be asked for, without what they need.

    Args:
        input, weight, bias: as the kernels take them.
        convolution: stride, padding, dilation, groups.
    """
    if _library.NODES is not None and not torch.compiler.is_compiling():
        return _library.NODES.conv_relu_pool(input, weight, bias, *convolution)
    trained = (input, weight) if bias is None else (input, weight, bias)
    if _library.is_recorded() and any(tensor.requires_grad for tensor in trained):
        return ConvReLUPool.apply(input, weight, bias, *convolution)
    return _inference(input, weight, bias, *convolution)


class ConvReLUPool(torch.autograd.Function):
    """Saves input, weight and a byte per pooled output: which position of its window won.

    In the style with one `forward(ctx, ...)`, as LinearReLU and for the same reason.
    """

    @staticmethod
    def forward(
        ctx,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        output, codes = _forward(input, weight, bias, stride, padding, dilation, groups)
        ctx.save_for_backward(codes, input, weight)
        ctx.convolution = (stride, padding, dilation, groups)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grads = (differentiate if _library.is_differentiated() else _backward)(
            grad_output, *ctx.saved_tensors, *ctx.convolution, *ctx.needs_input_grad[:3]
        )
        return (*grads, None, None, None, None)


def differentiate(
    grad_output: Tensor,
    codes: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *needs: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients, where somebody wants to differentiate them, or to map over them: by native
    operators, which torch knows how to."""
    size = convolved_size(input, weight, stride, padding, dilation)
    return torch.ops.aten.convolution_backward(
        expand(grad_output, codes, size),
        input,
        weight,
        weight.shape[:1],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        needs,
    )


def expand(grad_output: Tensor, codes: Tensor, z_size: Sequence[int]) -> Tensor:
    """The gradient of the convolution's output: that of each window at the position that won."""
    N, K, P, Q = codes.shape
    positions = torch.stack([grad_output.masked_fill(codes != i, 0) for i in range(4)], -1)
    grad_z = positions.view(N, K, P, Q, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(N, K, 2 * P, 2 * Q)
    return F.pad(grad_z, (0, z_size[1] - 2 * Q, 0, z_size[0] - 2 * P))
