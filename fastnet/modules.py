"""Drop-in modules on the fused ops. Each subclasses torch's own, so state dicts load both ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnet import functional


class Linear(nn.Linear):
    r"""`nn.Linear`, with the activation that follows it fused in.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether to add a learnable bias.
        activation: "relu", or None for `nn.Linear` as it is.

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
        if activation not in (None, "relu"):
            raise ValueError(f'activation must be None or "relu", not {activation!r}')
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if self.activation is None:
            return super().forward(input)
        return functional.linear_relu(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


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
