"""Batches gathered and normalised as tensors, without a Python call per picture."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastnet.data.images import ImageSet


class Batches:
    """Iterates once through a set, `(pictures, labels)` at a time; every `iter()` is an epoch.

    The pictures are what `ToTensor()` and `Normalize((mean,), (std,))` of torchvision make of them,
    bit for bit: float32 `(batch, channels, height, width)`.

    Args:
        images: the set.
        batch_size: pictures in a batch; the last one may be smaller.
        mean: subtracted, after scaling to 0...1.
        std: divided by.
        generator: draws a new order each epoch; None keeps the set's own.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        mean: float,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.images = images
        self.batch_size = batch_size
        self.mean = mean
        self.std = std
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.images.images, self.images.labels
        if self.generator is None:
            parts = zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)
            for pictures, targets in parts:
                yield self._normalise(pictures), targets
        else:
            order = torch.randperm(len(self.images), generator=self.generator)
            for chosen in order.to(images.device).split(self.batch_size):
                # Indexing would give the same, at six times the time.
                pictures = images.index_select(0, chosen)
                yield self._normalise(pictures), labels.index_select(0, chosen)

    def _normalise(self, pictures: Tensor) -> Tensor:
        # These three roundings, in this order, are torchvision's.
        return pictures.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)
