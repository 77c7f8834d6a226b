"""The fused ops as functions, with the signatures and the results of torch.nn.functional."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastnet._library import DEVICE_TYPES
from fastnet.ops import LinearReLU

_LINEAR_DTYPES = {
    "cpu": frozenset({torch.float32, torch.float64, torch.bfloat16}),
    "cuda": frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16}),
}
_LINEAR_DTYPES["meta"] = _LINEAR_DTYPES["cuda"]


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what the kernels read: dense memory, and no subclass's own behaviour."""
    kind = type(tensor)
    return (kind is Tensor or kind is torch.nn.Parameter) and tensor.layout is torch.strided


def _is_plain_autograd() -> bool:
    """Whether gradients are .backward()'s: torch.func and forward mode need native operators."""
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Computes :math:`\mathrm{relu}(x W^T + b)` in one kernel, and its gradients in one more.

    The result and the gradients are those of `torch.relu(F.linear(input, weight, bias))`. What the
    kernels do not cover (other dtypes and devices, sparse tensors, a bias that broadcasts) goes to
    those two operators.

    Args:
        input: `(*, in_features)`, any number of leading dimensions, also none; any strides.
        weight: `(out_features, in_features)`.
        bias: `(out_features)`, or None.

    All three have one dtype: float32, float64 or bfloat16, on CUDA also float16; half types are
    summed in float32. Under autocast they are cast as those of `F.linear` are.

    Returns:
        `(*, out_features)`, of the input's dtype.

    Raises:
        RuntimeError: where shapes, dtypes or devices do not fit together.
    """
    if torch.is_autocast_enabled(input.device.type):
        input, weight, bias = _autocast(input, weight, bias)
    device = input.device.type
    if (
        device in DEVICE_TYPES
        and input.dtype in _LINEAR_DTYPES[device]
        and weight.dim() == 2
        and (bias is None or (bias.dim() == 1 and bias.size(0) == weight.size(0)))
        and input.dim() > 0
        and _is_plain(input)
        and _is_plain(weight)
        and _is_plain_autograd()
    ):
        return LinearReLU.apply(input, weight, bias)
    return torch.relu(F.linear(input, weight, bias))


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts as autocast does for operators on its lower-precision list."""
    device = next(t for t in tensors if t is not None).device.type
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
