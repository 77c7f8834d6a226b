"""Labelled sets of samples, whole in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What a network is given, and what it shall answer.

    Attributes:
        inputs: pictures, uint8 `(N, channels, height, width)`, or features, float32 `(N, ...)`.
        targets: the classes, int64 `(N,)`, indices into `classes`; or values, float32 `(N, ...)`.
        classes: the class names; none for values.
        source: where it came from, for people.
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def to(self, device: torch.device | str) -> Samples:
        """The same, on a device."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def first(self, count: int) -> Samples:
        """The first few of them."""
        return replace(self, inputs=self.inputs[:count], targets=self.targets[:count])

    def spread(self, count: int) -> Samples:
        """A few of them, from the first to the last, as sets may lie sorted by class."""
        count = min(count, len(self))
        chosen = torch.arange(count) * len(self) // max(count, 1)
        return replace(self, inputs=self.inputs[chosen], targets=self.targets[chosen])

    def fingerprint(self) -> str:
        """Differs where inputs or targets do, or their order."""
        digest = hashlib.sha256(str(tuple(self.inputs.shape)).encode())
        for values in (self.inputs, self.targets):
            digest.update(values.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Dataset:
    """A named set, and how its pictures are normalised.

    Attributes:
        name: as `--dataset` takes it.
        load: takes `data_dir` and `download=`, returns the training and the test set.
        mean, std: of the pixels, scaled to 0...1: one number for each channel, or one for all.
    """

    name: str
    load: Callable[..., tuple[Samples, Samples]]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
