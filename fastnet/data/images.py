"""A labelled set of pictures, whole in memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Pictures and their labels.

    Attributes:
        images: uint8 `(N, channels, height, width)`.
        labels: int64 `(N,)`, indices into `classes`.
        classes: the class names.
        source: where it came from, for people.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return self.images.shape[0]
