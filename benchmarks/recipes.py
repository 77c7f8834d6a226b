"""Training steps of the named trainings, on every backend. MnistNet has a benchmark of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks import networks
from benchmarks.harness import FASTNET, Case
from fastnet.data import Batches, Samples
from fastnet.recipes import RECIPES, Recipe
from fastnet.recipes.runtime import start
from fastnet.recipes.tasks import Task

# The training, the shape of its pictures, and how many classes they have.
STEPS = (
    ("activation-net", (1, 28, 28), 10),
    ("simple-cnn", (1, 28, 28), 10),
    ("simple-cnn", (3, 32, 32), 10),
    ("cifar-mlp", (3, 32, 32), 10),
    ("cats-dogs", (3, 150, 150), 2),
    ("autoencoder", (1, 28, 28), 10),
    ("gan", (1, 28, 28), 10),
    ("dcgan", (1, 28, 28), 10),
)


def cases(quick: bool = False) -> Iterator[Case]:
    for name, shape, classes in STEPS[:2] if quick else STEPS:
        yield _step(name, shape, classes)


def _step(name: str, shape: tuple[int, ...], classes: int) -> Case:
    recipe = RECIPES[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    count = 4 * recipe.batch_size
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
    names = tuple(map(str, range(classes)))
    samples = Samples(images, torch.randint(classes, (count,)), names, "random")
    sides = {}
    for side, backend in (("eager", "torch"), ("compile", "compile"), (FASTNET, "fastnet")):
        task = _task(recipe, backend, samples)
        if side == FASTNET:  # in the format that the training has it in
            sides[side] = _once(task, samples)
            continue
        sides[side] = _once(task, samples, torch.contiguous_format)
        task = _task(recipe, backend, samples)
        if any(isinstance(m, nn.Conv2d) for m in task.network.modules()):
            sides[f"{side}, channels_last"] = _once(task, samples, torch.channels_last)
    case = f"{name}, batch {recipe.batch_size}, {'x'.join(map(str, shape))}"
    # Errors grow from step to step as the weights part; verification takes three.
    return Case("recipes", case, "step", sides, tolerance=2e-3, seconds=12.0)


def _task(recipe: Recipe, backend: str, samples: Samples) -> Task:
    shape, classes = tuple(samples.inputs.shape[1:]), len(samples.classes)
    with start() as runtime:
        task = recipe.task(recipe, recipe.settings(backend=backend), runtime, shape, classes)
    networks.without_dropout(task.network.train())
    return task


def _once(task: Task, samples: Samples, layout: torch.memory_format | None = None):
    """One step after the other, on batches that are ready."""
    if layout is not None:
        task.network.to(memory_format=layout)
    data = task.recipe.data
    on_device = samples.to(task.runtime.device)
    batches = itertools.cycle(
        [
            (
                pictures if layout is None else pictures.contiguous(memory_format=layout),
                targets,
            )
            for pictures, targets in Batches(on_device, task.recipe.batch_size, data.mean, data.std)
        ]
    )

    def once():
        torch.manual_seed(0)  # the noise of the generators
        measures = task.step(*next(batches))
        return [value for name, value in measures.items() if name.endswith("loss")]

    return once
