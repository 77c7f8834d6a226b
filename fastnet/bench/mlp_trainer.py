"""Epochs of fully connected networks: one native loop against torch's own loops.

Eager torch and torch.compile are given batches that are gathered and normalised already; fastnet
gathers and normalises in the loop, from uint8. On a GPU all data are there from the start,
torch.compile makes CUDA graphs of its own, and another side has the whole step as one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import fastnet
from fastnet.bench import machine, recipes
from fastnet.bench.harness import FASTNET, Case
from fastnet.data import MNIST, Batches, Samples
from fastnet.graphs import GraphedStep
from fastnet.recipes import RECIPES

LR = 1e-3
# Another way to train: of a network, whole batches of pictures and labels, and their size, a
# function that trains an epoch, and gives the parameters.
Trainer = Callable[[nn.Sequential, Samples, int], Callable[[], list[torch.Tensor]]]


def cases(quick: bool = False, others: dict[str, Trainer] | None = None) -> Iterator[Case]:
    """
    Args:
        quick: the most important one only.
        others: further sides (`benchmarks/peers.py` has some).
    """
    if torch.cuda.is_available():
        digits = recipes.pictures(recipes.GREY, 10, 60_000)  # as many as the full set
    else:
        digits, _ = MNIST.load()
    digits = digits.to(machine.device())
    yield _epoch((784, 28, 10), digits, 64, others)
    if quick:
        return
    for batch_size in (16, 256, 1024):
        yield _epoch((784, 28, 10), digits, batch_size, others)
    yield _epoch((784, 10), digits, 64, others)
    yield _epoch((784, 300, 100, 10), digits, 64, others)
    colour = recipes.pictures(recipes.COLOUR, 10, 320).to(machine.device())
    yield _epoch((3072, 1000, 500, 10), colour, 16, others)
    on_gpu = torch.cuda.is_available()  # where the script does not train
    if not others and not on_gpu and machine.has("the document's script", "torchvision", "PIL"):
        yield _document(digits)


def _network(widths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(machine.device())


def _epoch(
    widths: tuple[int, ...], images: Samples, batch_size: int, others: dict[str, Trainer] | None
) -> Case:
    """An epoch of whole batches in the set's own order, with Adam, on from where the last ended.

    Compared are epochs of three batches: training parts what rounding has parted.
    """
    count = len(images) // batch_size
    name = "-".join(map(str, widths))
    return Case(
        "mlp_trainer",
        f"{name}, batch {batch_size}, {count} steps",
        "epoch",
        _sides(widths, images.first(count * batch_size), batch_size, others),
        compared=_sides(widths, images.first(3 * batch_size), batch_size, others),
        tolerance=1e-2,
        seconds=4.0,
        series=name,
        x=batch_size,
    )


def _sides(
    widths: tuple[int, ...], images: Samples, batch_size: int, others: dict[str, Trainer] | None
) -> dict[str, Callable]:
    batches = list(Batches(images, batch_size, MNIST.mean, MNIST.std))
    torch._dynamo.reset()
    sides: dict[str, Callable] = {}
    on_gpu = torch.cuda.is_available()
    mode = "reduce-overhead" if on_gpu else None
    for side in ("eager", "compile", "graph")[: 3 if on_gpu else 2]:
        model = _network(widths)
        called = model
        if side == "compile":
            called = torch.compile(model, dynamic=False, mode=mode)
        sides[side] = _torch_epoch(model, called, batches, graphed=side == "graph")
    for side, trainer in (others or {}).items():
        sides[side] = trainer(_network(widths), images, batch_size)
    model = _network(widths)
    trainer = fastnet.MLPTrainer(model, lr=LR)

    def native():
        trainer.fit(
            images.inputs,
            images.targets,
            batch_size,
            mean=MNIST.mean,
            std=MNIST.std,
            shuffle=False,
        )
        return [p.detach() for p in model.parameters()]

    sides[FASTNET] = native
    return sides


def _torch_epoch(model, called, batches, graphed):
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def step(pictures, labels):
        optimizer.zero_grad()
        F.cross_entropy(called(pictures), labels).backward()
        optimizer.step()

    taken = GraphedStep(step, [optimizer]) if graphed else step

    def once():
        for pictures, labels in batches:
            taken(pictures, labels)
        return [p.detach() for p in model.parameters()]

    return once


def _document(digits: Samples) -> Case:
    """An epoch of 60,000 pictures, the digits that there are over and over, against the script of
    the tutorials as it is. Compared is the loss of a single batch."""
    chosen = torch.arange(60_000) % len(digits)
    images = replace(digits, inputs=digits.inputs[chosen], targets=digits.targets[chosen])
    return Case(
        "mlp_trainer",
        "60,000 pictures, batch 64",
        "epoch",
        _document_and_native(images),
        compared=_document_and_native(images.first(64)),
        tolerance=1e-4,
        seconds=0.1,
    )


def _document_and_native(images: Samples) -> dict[str, Callable]:
    recipe = RECIPES["mnist-net"]
    script = recipes.document_epoch(recipe, images)
    model = recipes.task_on(recipe, "fastnet", images).network
    start = copy.deepcopy(model.state_dict())
    trainer = fastnet.MLPTrainer(model, lr=LR)
    order = torch.Generator()

    def native():
        model.load_state_dict(start)
        trainer.optimizer.state.clear()
        (epoch,) = trainer.fit(
            images.inputs, images.targets, 64, 1, MNIST.mean, MNIST.std, order.manual_seed(0)
        )
        return [torch.tensor(epoch.loss)]

    # The script's first losses: of the one batch that is compared there is one.
    return {"document script": lambda: script()[:1], FASTNET: native}
