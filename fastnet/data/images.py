"""Labelled sets of pictures, whole in memory."""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True)
class Dataset:
    """A named set, and how its pictures are normalised.

    Attributes:
        name: as `--dataset` takes it.
        load: takes `data_dir` and `download=`, returns the training and the test set.
        mean, std: of the pixels, scaled to 0...1.
    """

    name: str
    load: Callable[..., tuple[ImageSet, ImageSet]]
    mean: float
    std: float
