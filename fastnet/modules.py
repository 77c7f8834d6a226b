"""Drop-in modules on the fused ops. Each subclasses torch's own, so state dicts load both ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnet import functional


class Linear(nn.Linear):
    r"""`nn.Linear`, with the activation that follows it fused in; see `functional.linear_relu` and
    `functional.linear`.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether to add a learnable bias.
        activation: "relu", or None.

    Raises:
        TypeError: for a bias that is a string, which was meant as the activation.
        ValueError: for another activation.

    Shape: `(*, in_features)` → `(*, out_features)`.

    Example:
        >>> hidden = fastnet.Linear(784, 28, activation="relu")  # nn.Linear(784, 28) and nn.ReLU()
        >>> hidden(torch.randn(64, 784)).shape
        torch.Size([64, 28])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        if isinstance(bias, str):  # which would count as True, and leave out what was meant
            raise TypeError(
                f"bias must be True or False, not {bias!r}; the activation is given by name: "
                'activation="relu"'
            )
        if activation not in (None, "relu"):
            raise ValueError(f'activation must be None or "relu", not {activation!r}')
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if self.activation is None:
            return functional.linear(input, self.weight, self.bias)
        return functional.linear_relu(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class ConvReLUPool2d(nn.Conv2d):
    r"""`nn.Conv2d`, `nn.ReLU` and `nn.MaxPool2d` in one; see `functional.conv_relu_pool2d`.

    Windows of 2 x 2 side by side are fused, and filters of 3 x 3 and 5 x 5 without stride, dilation
    or groups are the fastest. Anything else has the same result by way of torch's functions.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in `nn.Conv2d`.
        pool_kernel_size, pool_stride, pool_padding, ceil_mode: as `kernel_size`, `stride`,
            `padding` and `ceil_mode` in `nn.MaxPool2d` (2, the kernel size, 0, False).

    Raises:
        RuntimeError, ValueError: where `nn.Conv2d` and `nn.MaxPool2d` raise them.

    Shape: `(N, in_channels, H, W)` or `(in_channels, H, W)` → the same with `out_channels` and the
        pooled height and width: by default half of the convolution's, rounded down.

    Example:
        >>> block = fastnet.ConvReLUPool2d(3, 32, 3, padding=1)  # Conv2d, ReLU, MaxPool2d(2)
        >>> block(torch.randn(64, 3, 32, 32)).shape
        torch.Size([64, 32, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pool_kernel_size: int | tuple[int, int] = 2,
        pool_stride: int | tuple[int, int] | None = None,
        pool_padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        return conv_relu_pool(
            self,
            input,
            self.pool_kernel_size,
            self.pool_stride,
            self.pool_padding,
            self.ceil_mode,
        )

    def extra_repr(self) -> str:
        pool = f"pool_kernel_size={self.pool_kernel_size}"
        if self.pool_stride is not None:
            pool += f", pool_stride={self.pool_stride}"
        if self.pool_padding:
            pool += f", pool_padding={self.pool_padding}"
        if self.ceil_mode:
            pool += ", ceil_mode=True"
        return f"{super().extra_repr()}, {pool}"


def conv_relu_pool(
    conv: nn.Conv2d,
    input: Tensor,
    pool_kernel_size: int | tuple[int, int],
    pool_stride: int | tuple[int, int] | None,
    pool_padding: int | tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    """`functional.conv_relu_pool2d` with a convolution's own parameters and options."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    return functional.conv_relu_pool2d(
        input,
        conv.weight,
        conv.bias,
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
        pool_kernel_size=pool_kernel_size,
        pool_stride=pool_stride,
        pool_padding=pool_padding,
        ceil_mode=ceil_mode,
    )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss` on the fused kernel; see `functional.cross_entropy`.

    Args:
        weight: a factor for every class, `(C)`; or None.
        ignore_index: a target that counts neither in the loss nor in the mean.
        reduction: "none", "mean" or "sum".
        label_smoothing: the share of every target that is spread over all classes, in [0, 1].

    Shape: logits `(C)`, `(N, C)` or `(N, C, d1, ...)`, and class indices of that shape without
    `C` or probabilities of that shape → a scalar, or for reduction "none" one loss per target.

    Example:
        >>> loss = fastnet.CrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.randn(64, 10), torch.randint(10, (64,))).shape
        torch.Size([])
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
        )
