"""A batch of a shuffled set of pictures: gathered, widened to float32 and normalised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastnet.bench import machine
from fastnet.bench.harness import FASTNET, Case
from fastnet.bench.passes import compiled
from fastnet.data import CATS_DOGS_150, CIFAR10, MNIST, Dataset
from fastnet.ops import gather_pictures

# Data set, the shape of its pictures, how many there are, how many a batch has.
SETS: tuple[tuple[Dataset, tuple[int, int, int], int, int], ...] = (
    (MNIST, (1, 28, 28), 60_000, 64),
    (MNIST, (1, 28, 28), 60_000, 1024),
    (CIFAR10, (3, 32, 32), 50_000, 64),
    (CATS_DOGS_150, (3, 150, 150), 2_000, 20),
)


def cases(quick: bool = False) -> Iterator[Case]:
    for dataset, shape, count, batch_size in SETS[: 1 if quick else None]:
        torch.manual_seed(0)
        pictures = torch.randint(0, 256, (count, *shape), dtype=torch.uint8).to(machine.device())
        batch = batch_size * pictures[0].numel()
        yield Case(
            "gather_pictures",
            f"{batch_size} of {count:,}, {'x'.join(map(str, shape))}",
            "forward",
            _sides(dataset, pictures, batch_size),
            bytes=batch * 5,  # bytes are read, and floats are written
            tolerance=1e-6,
        )


def _sides(dataset: Dataset, pictures: Tensor, batch_size: int) -> dict[str, Callable]:
    torch._dynamo.reset()
    parts = torch.randperm(len(pictures)).split(batch_size)
    parts = [part.to(pictures.device) for part in parts if len(part) == batch_size]
    channels = len(dataset.mean)
    mean, std = (
        # A number is subtracted faster than a tensor of one element.
        each[0] if channels == 1 else pictures.new_tensor(each, dtype=torch.float32).view(-1, 1, 1)
        for each in (dataset.mean, dataset.std)
    )
    table = gather_pictures.normalized(dataset.mean, dataset.std).to(pictures.device)

    def native(order: Tensor) -> Tensor:
        chosen = pictures.index_select(0, order)
        return chosen.to(torch.float32).div_(255).sub_(mean).div_(std)

    def fused(order: Tensor) -> Tensor:
        return gather_pictures.apply(pictures, order, table)

    def side(function: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        turns = itertools.cycle(parts)
        return lambda: [function(next(turns))]

    return {"eager": side(native), "compile": side(compiled(native)), FASTNET: side(fused)}
