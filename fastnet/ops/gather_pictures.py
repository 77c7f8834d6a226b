"""gather_pictures: a batch of a set of uint8 pictures, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnet import _library

_gather = torch.ops.fastnet.gather_pictures.default


@torch.library.register_fake("fastnet::gather_pictures")
def fake_gather(pictures: Tensor, order: Tensor | None, table: Tensor) -> Tensor:
    chosen = pictures.shape[0] if order is None else order.shape[0]
    return table.new_empty((chosen, *pictures.shape[1:]))


def normalized(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The table of what torchvision's `ToTensor()` and `Normalize(mean, std)` make of bytes.

    Args:
        mean, std: one number for each channel, or one for all.

    Returns:
        `(channels, 256)` of float32, on the CPU.
    """
    # These three roundings, in this order, are torchvision's. (A GPU divides by a number in two.)
    values = torch.arange(256, dtype=torch.float32, device="cpu") / 255
    mean, std = (values.new_tensor(each).view(-1, 1) for each in (mean, std))
    return (values - mean) / std


def apply(pictures: Tensor, order: Tensor | None, table: Tensor) -> Tensor:
    """The pictures that `order` names, or all, each byte as `table` has it for its channel.

    Args:
        pictures: `(n, channels, *)` of uint8, any strides.
        order: `(chosen)` of int64, each number in 0...n-1, or None.
        table: `(channels, 256)` of float32, or `(1, 256)` for all channels.

    Returns:
        `(chosen, channels, *)` of float32, contiguous.

    Raises:
        RuntimeError: for other shapes or dtypes, and for tensors on several devices.
        IndexError: where the order names a picture that is not there, on the CPU. On CUDA the
            kernel stops with a device-side assertion.
    """
    if order is not None and not pictures.is_contiguous():
        pictures, order = pictures.index_select(0, order), None
    if pictures.is_cpu or (
        pictures.is_cuda
        and _library.CUDA_STATUS == "loaded"
        and _library.is_built_for(pictures.device.index)
    ):
        return _gather(pictures.contiguous(), order, table)
    return native(pictures if order is None else pictures.index_select(0, order), table)


def native(pictures: Tensor, table: Tensor) -> Tensor:
    """All of the pictures, by torch's own operators."""
    channels = torch.arange(table.shape[0], device=table.device)
    return table[channels.view(-1, *[1] * (pictures.dim() - 2)), pictures.long()]
