"""gather_pictures: a batch of a set of uint8 pictures, as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnet import _library

_gather = torch.ops.fastnet.gather_pictures.default


@torch.library.register_fake("fastnet::gather_pictures")
def fake_gather(pictures: Tensor, order: Tensor | None, table: Tensor) -> Tensor:
    chosen = pictures.shape[0] if order is None else order.shape[0]
    return table.new_empty((chosen, *pictures.shape[1:]))


def apply(pictures: Tensor, order: Tensor | None, table: Tensor) -> Tensor:
    """The pictures that `order` names, or all, each byte as `table` has it for its channel.

    Args:
        pictures: `(n, channels, *)` of uint8.
        order: `(chosen)` of int64, each number in 0...n-1, or None.
        table: `(channels, 256)` of float32, or `(1, 256)` for all channels.

    Returns:
        `(chosen, channels, *)` of float32.

    Raises:
        IndexError: where the order names a picture that is not there, on the CPU. On CUDA the
            kernel stops with a device-side assertion.
    """
    if pictures.is_contiguous() and (
        pictures.is_cpu
        or (
            pictures.is_cuda
            and _library.CUDA_STATUS == "loaded"
            and _library.is_built_for(pictures.device.index)
        )
    ):
        return _gather(pictures, order, table)
    chosen = pictures if order is None else pictures.index_select(0, order)
    rows = torch.arange(table.shape[0], device=table.device)
    rows = rows.view(-1, *[1] * (pictures.dim() - 2))
    return table[rows, chosen.long()]
