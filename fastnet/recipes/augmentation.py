"""Pictures changed at random before they are trained on, so that a network sees more of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnet.errors import FastnetError


def flips_and_turns(pictures: Tensor) -> Tensor:
    """Each of the pictures, uint8 `(batch, channels, height, width)`, turned over left to right or
    not, and turned by up to 15 degrees.

    Raises:
        FastnetError: without torchvision.
    """
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise FastnetError(
            f"--augment needs torchvision ({error}): pip install 'fastnet[vision]'."
        ) from error
    change = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
        ]
    )
    return torch.stack([change(picture) for picture in pictures])
