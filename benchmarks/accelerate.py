"""Whole training steps of existing networks, as they are and after fastnet.accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import fastnet
from benchmarks import networks
from benchmarks.harness import FASTNET, Case
from fastnet.cli import named_network
from fastnet.errors import FastnetError

SIDES = ("eager", "eager, channels_last", "compile", "compile, channels_last", FASTNET)


def cases(quick: bool = False) -> Iterator[Case]:
    yield _step("SimpleCNN, 64x1x28x28", lambda: networks.SimpleCNN(1, 28), (64, 1, 28, 28))
    if quick:
        return
    yield _step("SimpleCNN, 64x3x32x32", networks.SimpleCNN, (64, 3, 32, 32))
    from torchvision import models

    # Dropout at 0: torch.compile draws other random numbers than eager torch, and the sides are
    # compared.
    for name in ("alexnet", "vgg11"):
        model = getattr(models, name)
        yield _step(
            f"{model.__name__}, 8x3x64x64",
            lambda model=model: model(weights=None, num_classes=10, dropout=0.0),
            (8, 3, 64, 64),
            seconds=30.0,
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
        return networks.without_dropout(named_network(model))

    try:
        logits = network().eval()(torch.zeros(shape))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise FastnetError(f"--model {model} does not take pictures {shape} ({reason}).") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise FastnetError(f"--model {model} does not give logits, (batch, classes), for pictures.")
    return _step(name, network, shape, seconds=12.0, classes=logits.shape[1])


def _step(
    name: str,
    network: Callable[[], nn.Module],
    shape: tuple[int, ...],
    seconds: float = 6.0,
    channels_last: bool = False,
    classes: int = 10,
) -> Case:
    """Forward, loss, backward and a step of SGD; fastnet's in channels_last where that is told."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = torch.randn(shape, device=device)
    target = torch.randint(classes, shape[:1], device=device)
    torch._dynamo.reset()
    sides = {}
    for side in SIDES:
        torch.manual_seed(1)
        model = network().to(device)
        called, x = model, pictures
        if "channels_last" in side or (side == FASTNET and channels_last):
            model.to(memory_format=torch.channels_last)
            x = pictures.contiguous(memory_format=torch.channels_last)
        if side == FASTNET:
            called = fastnet.accelerate(model)
        elif side.startswith("compile"):
            called = torch.compile(model, dynamic=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        sides[side] = _once(called, optimizer, x, target)
    return Case("accelerate", name, "step", sides, tolerance=1e-3, seconds=seconds)


def _once(called, optimizer, pictures, target):
    def once():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(called(pictures), target)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return once
