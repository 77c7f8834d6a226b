"""Whole training steps of existing networks, as they are and after fastnet.accelerate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import fastnet
from fastnet.bench import machine, networks
from fastnet.bench.harness import FASTNET, Case
from fastnet.bench.passes import rotation
from fastnet.errors import FastnetError, in_one_line

SIDES = ("eager", "eager, channels_last", "compile", "compile, channels_last", FASTNET)


def cases(quick: bool = False) -> Iterator[Case]:
    yield _step("SimpleCNN, 64x1x28x28", lambda: networks.SimpleCNN(1, 28), (64, 1, 28, 28))
    if quick:
        return
    yield _step("SimpleCNN, 64x3x32x32", networks.SimpleCNN, (64, 3, 32, 32))
    if not machine.has("AlexNet and VGG11", "torchvision"):
        return
    from torchvision import models

    # Dropout at 0: torch.compile draws other random numbers than eager torch, and the sides are
    # compared.
    for name in ("alexnet", "vgg11"):
        model = getattr(models, name)
        yield _step(
            f"{model.__name__}, 8x3x64x64",
            lambda model=model: model(weights=None, num_classes=10, dropout=0.0),
            (8, 3, 64, 64),
            # Most of their convolutions have no pooling to fuse, and torch's own are faster there.
            channels_last=True,
        )


def step_of(name: str, model: str, shape: tuple[int, ...]) -> Case:
    """A step of a network that is named as `fastnet info --model` takes it, without its dropout:
    the sides would draw other numbers, and are compared.

    Raises:
        FastnetError: for a name that is no network, or one that does not give classes.
    """

    def network() -> nn.Module:
        return networks.without_dropout(networks.named(model))

    probe = network().eval()
    try:
        logits = probe(torch.zeros(shape))
    except Exception as error:  # a forward of the user's
        raise FastnetError(
            f"--model {model} does not take pictures {shape} ({in_one_line(error)})."
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise FastnetError(f"--model {model} does not give logits, (batch, classes), for pictures.")
    return _step(name, network, shape, classes=logits.shape[1])


def _step(
    name: str,
    network: Callable[[], nn.Module],
    shape: tuple[int, ...],
    channels_last: bool = False,
    classes: int = 10,
) -> Case:
    """Forward, loss, backward and a step of SGD; fastnet's in channels_last where that is told."""
    torch.manual_seed(0)
    where = machine.device()

    def draw():
        target = torch.randint(classes, shape[:1], device=where)
        return torch.randn(shape, device=where), target

    batches = rotation(draw, 4 * math.prod(shape))
    torch._dynamo.reset()
    sides = {}
    for side in SIDES:
        torch.manual_seed(1)
        model = network().to(where)
        called, its_batches = model, batches
        if "channels_last" in side or (side == FASTNET and channels_last):
            model.to(memory_format=torch.channels_last)
            its_batches = [(x.to(memory_format=torch.channels_last), t) for x, t in batches]
        if side == FASTNET:
            called = fastnet.accelerate(model)
        elif side.startswith("compile"):
            called = torch.compile(model, dynamic=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        sides[side] = _once(called, optimizer, itertools.cycle(its_batches))
    return Case("accelerate", name, "step", sides, tolerance=1e-3)


def _once(called, optimizer, batches):
    def once():
        pictures, target = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(called(pictures), target)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return once
