"""Batches gathered and normalised as tensors, without a Python call per picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastnet.data.samples import Samples
from fastnet.ops import gather_pictures


class Batches:
    """Iterates once through a set, `(inputs, targets)` at a time; every `iter()` is an epoch.

    Pictures become what `ToTensor()` and `Normalize(mean, std)` of torchvision make of them, bit
    for bit: float32 `(batch, channels, height, width)`, contiguous. Features stay as they are. Both
    are where the set is.

    Args:
        samples: the set.
        batch_size: samples in a batch; the last one may be smaller.
        mean: subtracted from pictures scaled to 0...1; one for each channel, or one for all.
        std: divided by; as many.
        generator: draws a new order each epoch; None keeps the set's own.
        augment: makes other uint8 pictures of a batch's, before they are normalised.
        rank, world_size: of every batch this iterates over the share of one process among several:
            each `world_size`-th sample, beginning with number `rank`.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        generator: torch.Generator | None = None,
        *,
        augment: Callable[[Tensor], Tensor] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.samples = samples
        self.batch_size = batch_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.generator = generator
        self.augment = augment
        self.rank, self.world_size = rank, world_size
        self._table = gather_pictures.normalized(self.mean, self.std).to(samples.inputs.device)

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.samples.inputs, self.samples.targets
        if self.generator is None and self.world_size == 1:
            parts = zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True)
            for chosen, answers in parts:
                yield self._prepared(chosen), answers
            return
        if self.generator is None:
            order = torch.arange(len(self.samples))
        else:
            order = torch.randperm(len(self.samples), generator=self.generator)
        for whole in order.to(inputs.device).split(self.batch_size):
            # A process without a share takes part with a sample of weight 0.
            part = whole[self.rank :: self.world_size] if self.rank < len(whole) else whole[:1]
            # Indexing the targets would give the same, at six times the time.
            yield self._prepared(inputs, part), targets.index_select(0, part)

    def weight(self, number: int) -> float:
        """What the mean over this process's share of batch `number` counts, so that the mean over
        the processes is the mean over the batch."""
        whole = min(self.batch_size, len(self.samples) - number * self.batch_size)
        return len(range(self.rank, whole, self.world_size)) * self.world_size / whole

    def _prepared(self, inputs: Tensor, order: Tensor | None = None) -> Tensor:
        """Those of the inputs that `order` names, or all, as a network takes them."""
        are_pictures = inputs.dtype == torch.uint8
        if order is not None and not (are_pictures and self.augment is None):
            inputs, order = inputs.index_select(0, order), None
        if not are_pictures:
            return inputs
        if self.augment is not None:
            inputs = self.augment(inputs)
            if inputs.dtype != torch.uint8:
                raise TypeError(f"augment must give pictures of uint8, but gave {inputs.dtype}")
        return gather_pictures.apply(inputs, order, self._table.to(inputs.device))
