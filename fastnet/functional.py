"""The fused ops as functions, with the signatures and the results of torch.nn.functional."""

from __future__ import annotations

import functools
import re

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastnet._library import CUDA_STATUS, build_info
from fastnet.ops import LinearReLU

# This file is on the path of every call, and its Python is felt at the sizes that fastnet is for:
# the checks below are the quick ones for each question (a property of 0.1 µs, not one of 0.6).

_CPU_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})
_CUDA_DTYPES = _CPU_DTYPES | {torch.float16} if CUDA_STATUS == "loaded" else frozenset()
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


@functools.cache
def _built_for(device_index: int) -> bool:
    """Whether the CUDA kernels have code for this card: its own generation's, or PTX to compile."""
    major, minor = torch.cuda.get_device_capability(device_index)
    for built in (build_info()["cuda_architectures"] or "").replace(" ", ";").split(";"):
        numbers = re.match(r"(\d+)\.(\d+)", built)
        if numbers is None:
            continue
        of = (int(numbers[1]), int(numbers[2]))
        if (of[0] == major and of[1] <= minor) or ("PTX" in built and of <= (major, minor)):
            return True
    return False


def _has_kernels(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the fused ops take these: dtype, device, dense memory, and .backward()'s autograd.

    Tensor subclasses have behaviour of their own; torch.func and forward-mode derivatives need
    operators that they know.
    """
    return (
        input.dtype in (_CPU_DTYPES if input.is_cpu else _CUDA_DTYPES if input.is_cuda else ())
        and type(input) in _PLAIN_TYPES
        and type(weight) in _PLAIN_TYPES
        and input.layout is torch.strided
        and weight.layout is torch.strided
        and (bias is None or (type(bias) in _PLAIN_TYPES and bias.dtype is weight.dtype))
        and (input.is_cpu or _built_for(input.device.index))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


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
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    if (
        weight.dim() == 2
        and (bias is None or (bias.dim() == 1 and bias.size(0) == weight.size(0)))
        and input.dim() > 0
        and _has_kernels(input, weight, bias)
    ):
        return LinearReLU.apply(input, weight, bias)
    return torch.relu(F.linear(input, weight, bias))


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts as autocast does for operators on its lower-precision list."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
