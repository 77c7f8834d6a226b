"""MnistNet as a whole: a training step, and an epoch of 60,000 pictures."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import networks
from benchmarks.harness import FASTNET, Case
from fastnet.data import Batches, Samples
from fastnet.recipes import RECIPES
from fastnet.recipes.runtime import ONE_PROCESS
from fastnet.recipes.tasks import Task

RECIPE = RECIPES["mnist-net"]


def task(backend: str) -> Task:
    return RECIPE.task(RECIPE, RECIPE.settings(backend=backend), ONE_PROCESS, (1, 28, 28), 10)


def pictures(count: int) -> Samples:
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
    return Samples(images, torch.randint(0, 10, (count,)), tuple("0123456789"), "random")


def cases(quick: bool = False) -> Iterator[Case]:
    """On the CPU: the trainings do not run on a GPU yet."""
    if torch.cuda.is_available():
        return
    for batch_size in (64,) if quick else (16, 64, 256, 1024):
        yield _step(batch_size)
    if not quick:
        yield _epoch()


def _step(batch_size: int) -> Case:
    images = pictures(8 * batch_size)
    sides = {}
    torch._dynamo.reset()
    for side, backend in (("eager", "torch"), ("compile", "compile"), (FASTNET, "fastnet")):
        batches = itertools.cycle(
            list(Batches(images, batch_size, RECIPE.data.mean, RECIPE.data.std))
        )
        sides[side] = _one_step(task(backend), batches)
    # Errors grow from step to step as the weights part; verification takes three.
    return Case("mnist_net", f"batch {batch_size}", "step", sides, tolerance=1e-4)


def _one_step(trained: Task, batches):
    trained.network.train()

    def once():
        return [trained.step(*next(batches))["loss"]]

    return once


def document_epoch(images: Samples):
    """The tutorials' own loop: a DataLoader, one Python transform a picture, eager torch, Adam."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    arrays, labels = images.inputs[:, 0].numpy(), images.targets.tolist()
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(RECIPE.data.mean, RECIPE.data.std)]
    )

    class Mnist(Dataset):
        """What torchvision.datasets.MNIST does for each picture."""

        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return transform(Image.fromarray(arrays[index], mode="L")), labels[index]

    def document():
        torch.manual_seed(0)
        model = networks.MnistNet()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
        for data, target in DataLoader(Mnist(), batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss = F.nll_loss(model(data), target)
            loss.backward()
            optimizer.step()
        return []

    return document


def _epoch() -> Case:
    """The tutorials' own loop and ours, batch by batch."""
    images = pictures(60_000)

    def ours(backend):
        def once():
            trained = task(backend)
            order = torch.Generator().manual_seed(0)
            for batch in Batches(images, 64, RECIPE.data.mean, RECIPE.data.std, order):
                trained.step(*batch)
            return []

        return once

    # fastnet's data layer under native torch's kernels is named, but is not the alternative here.
    sides = {"document script": document_epoch(images), FASTNET: ours("fastnet")}
    start = time.perf_counter()
    ours("torch")()
    print(f"  (native modules on fastnet's data layer: {time.perf_counter() - start:.2f} s)")
    return Case("mnist_net", "60,000 pictures, batch 64", "epoch", sides, seconds=0.1)
