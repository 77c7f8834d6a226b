"""The named trainings as wholes: a step on every backend, and an epoch against the tutorials' own
script."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fastnet.bench import machine, networks
from fastnet.bench.harness import FASTNET, Case
from fastnet.data import Batches, Samples
from fastnet.recipes import RECIPES, Recipe
from fastnet.recipes.runtime import start
from fastnet.recipes.tasks import Task, step_in_graph

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
# The training, the shape of its pictures, how many classes, and batches beside its own.
STEPS = (
    ("mnist-net", GREY, 10, (16, 256, 1024)),
    ("softmax-regression", GREY, 10, ()),
    ("activation-net", GREY, 10, (16, 256, 1024)),
    ("batch-net", GREY, 10, ()),
    ("simple-cnn", GREY, 10, (16, 256, 1024)),
    ("simple-cnn", COLOUR, 10, ()),
    ("cifar-mlp", COLOUR, 10, ()),
    ("cats-dogs", (3, 150, 150), 2, ()),
    ("resnet18-transfer", (3, 224, 224), 2, ()),
    ("vgg16-transfer", (3, 224, 224), 2, ()),
    ("autoencoder", GREY, 10, ()),
    ("gan", GREY, 10, ()),
    ("dcgan", GREY, 10, ()),
)
# The training, the shape of its pictures, how many classes, and how many pictures an epoch has.
EPOCHS = (
    ("mnist-net", GREY, 10, 60_000),
    ("activation-net", GREY, 10, 12_800),
    ("simple-cnn", GREY, 10, 6_400),
    ("simple-cnn", COLOUR, 10, 6_400),
    ("cifar-mlp", COLOUR, 10, 3_200),
    ("cats-dogs", (3, 150, 150), 2, 200),
    ("autoencoder", GREY, 10, 12_800),
    ("gan", GREY, 10, 12_800),
)
QUICK = ("mnist-net", "activation-net", "simple-cnn")


def cases(quick: bool = False) -> Iterator[Case]:
    for name, shape, classes, more in STEPS:
        if quick and name not in QUICK:
            continue
        recipe = RECIPES[name]
        if recipe.pretrained and not machine.has(name, "torchvision"):
            continue
        for batch_size in sorted((recipe.batch_size, *(() if quick else more))):
            # Errors grow from step to step as the weights part; verification takes three.
            yield Case(
                "recipes",
                f"{name}, batch {batch_size}, {'x'.join(map(str, shape))}",
                "step",
                step_sides(recipe, pictures(shape, classes, 4 * batch_size), batch_size),
                tolerance=2e-3,
                series=f"{name}, {'x'.join(map(str, shape))}",
                x=batch_size,
            )
    if quick or not machine.has("the documents' scripts", "torchvision", "PIL"):
        return
    for name, shape, classes, count in EPOCHS:
        yield epoch(RECIPES[name], pictures(shape, classes, count))


def pictures(shape: tuple[int, ...], classes: int, count: int) -> Samples:
    """Random ones, whose size is all that matters to time."""
    torch.manual_seed(0)
    inputs = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
    names = tuple(map(str, range(classes)))
    return Samples(inputs, torch.randint(classes, (count,)), names, "random")


def step_sides(recipe: Recipe, samples: Samples, batch_size: int) -> dict[str, Callable]:
    """One step after the other on batches that are ready, on every backend and in both memory
    formats; fastnet's in the one that the training has."""
    torch._dynamo.reset()
    sides = {}
    for side, backend in (("eager", "torch"), ("compile", "compile"), (FASTNET, "fastnet")):
        task = task_on(recipe, backend, samples)
        if side == FASTNET:
            sides[side] = _steps(task, samples, batch_size)
            continue
        sides[side] = _steps(task, samples, batch_size, torch.contiguous_format)
        task = task_on(recipe, backend, samples)
        if any(isinstance(m, nn.Conv2d) for m in task.network.modules()):
            sides[f"{side}, channels_last"] = _steps(task, samples, batch_size, torch.channels_last)
    return sides


def task_on(recipe: Recipe, backend: str, samples: Samples) -> Task:
    """A training about to begin, from random weights, without its dropout."""
    shape, classes = tuple(samples.inputs.shape[1:]), len(samples.classes)
    weights = {"weights": "none"} if recipe.pretrained else {}
    with start() as runtime:
        settings = recipe.settings(backend=backend, **weights)
        task = recipe.task(recipe, settings, runtime, shape, classes)
    networks.without_dropout(task.network.train())
    return task


def _steps(
    task: Task, samples: Samples, batch_size: int, layout: torch.memory_format | None = None
) -> Callable[[], list[Tensor]]:
    if layout is not None:
        task.network.to(memory_format=layout)
    elif task.recipe.channels_last:
        layout = torch.channels_last
    data = task.recipe.data
    on_device = samples.to(task.runtime.device)
    batches = itertools.cycle(
        [
            (inputs if layout is None else inputs.contiguous(memory_format=layout), targets)
            for inputs, targets in Batches(on_device, batch_size, data.mean, data.std)
        ]
    )

    step = step_in_graph(task)
    draws = hasattr(task.network, "latent_shape")
    # torch.manual_seed takes longer than a small network's step.
    on_gpu = on_device.inputs.is_cuda
    seed = torch.cuda.manual_seed if on_gpu else torch.default_generator.manual_seed

    def once():
        if draws:
            seed(0)  # the noise of the generator
        return _losses(step(*next(batches)))

    return once


def _losses(measures: dict[str, Tensor]) -> list[Tensor]:
    return [value for name, value in measures.items() if name.endswith("loss")]


def epoch(recipe: Recipe, samples: Samples) -> Case:
    """An epoch of the tutorials' script, of native torch on fastnet's batches, and of fastnet."""
    sides = {"document script": document_epoch(recipe, samples)}
    for side, backend in (("eager", "torch"), (FASTNET, "fastnet")):
        sides[side] = _epoch_on_batches(recipe, backend, samples)
    shape = "x".join(map(str, samples.inputs.shape[1:]))
    name = f"{recipe.name}, {len(samples):,} pictures of {shape}"
    return Case("recipes", name, "epoch", sides, tolerance=5e-3, seconds=0.1)


def _epoch_on_batches(recipe: Recipe, backend: str, samples: Samples):
    def once():
        task = task_on(recipe, backend, samples)
        on_device = samples.to(task.runtime.device)
        batches = Batches(on_device, recipe.batch_size, recipe.data.mean, recipe.data.std, _order())
        return _trained_on(task, batches)

    return once


def document_epoch(recipe: Recipe, samples: Samples) -> Callable[[], list[Tensor]]:
    """The tutorials' own loop: a DataLoader, Python transforms for each picture, eager torch, and
    the optimizer as its constructor makes it.

    Returns a function that trains a new network for an epoch, and gives the first three losses.
    """
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    images, labels = samples.inputs.permute(0, 2, 3, 1).numpy(), samples.targets.tolist()
    images = images[..., 0] if images.shape[-1] == 1 else images
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(recipe.data.mean, recipe.data.std)]
    )

    class Pictures(Dataset):
        """What torchvision's data sets do for each picture."""

        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return transform(Image.fromarray(images[index])), labels[index]

    own = recipe.optimizer
    plain = partial(own.func, **{k: v for k, v in own.keywords.items() if k != "fused"})

    def once():
        task = task_on(replace(recipe, optimizer=plain), "torch", samples)
        order = torch.randperm(len(samples), generator=_order()).tolist()
        loader = DataLoader(Pictures(), batch_size=recipe.batch_size, sampler=order)
        where = task.runtime.device
        return _trained_on(task, ((x.to(where), target.to(where)) for x, target in loader))

    return once


def _order() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _trained_on(task: Task, batches) -> list[Tensor]:
    """Steps through an epoch. Gives the losses of three, which tell that all sides have the same
    pictures in the same order; later ones part with the rounding."""
    first = []
    step = step_in_graph(task)
    for number, (inputs, targets) in enumerate(batches):
        if number < 3:
            torch.manual_seed(number)  # the noise of the generators
        measures = step(inputs, targets)
        if number < 3:
            first += [loss.clone() for loss in _losses(measures)]  # a graph writes over its own
    return first
