"""A step of fastnet.optim, of small networks' parameters and of larger ones', and `zero_grad`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastnet import models, optim
from fastnet.bench import machine
from fastnet.bench.harness import FASTNET, Case

ADAM = ("Adam", {"lr": 1e-3})
MOMENTUM = ("SGD", {"lr": 1e-3, "momentum": 0.9})
# What has the parameters, by name: the shapes of weights and biases.
NETWORKS: dict[str, Callable[[], list[torch.Size]]] = {
    "784-28-10": lambda: _shapes(models.mlp(784, 28, 10)),
    "784-300-100-10": lambda: _shapes(models.mlp(784, 300, 100, 10)),
    "SimpleCNN": lambda: _shapes(models.SimpleCNN()),
    "3072-1000-500-10": lambda: _shapes(models.mlp(3072, 1000, 500, 10)),
    "ResNet-18": lambda: _shapes(_resnet()),
}
RULES = (
    *itertools.product(NETWORKS, [ADAM]),
    *itertools.product(("784-28-10", "784-300-100-10"), [("SGD", {"lr": 1e-3}), MOMENTUM]),
)


def cases(quick: bool = False) -> Iterator[Case]:
    for network, (name, options) in RULES[: 2 if quick else None]:
        if network == "ResNet-18" and not machine.has(network, "torchvision"):
            continue
        shapes = NETWORKS[network]()
        momentum = " with momentum" if "momentum" in options else ""
        numbers = sum(shape.numel() for shape in shapes)
        states = {"Adam": 2, "SGD": int("momentum" in options)}[name]
        yield Case(
            "optimizer",
            f"{name}{momentum}, {network}",
            "step",
            _sides(name, options, shapes),
            # Weights and states are read and written, gradients read.
            bytes=4 * numbers * (3 + 2 * states),
        )


def _shapes(network: torch.nn.Module) -> list[torch.Size]:
    return [p.shape for p in network.parameters()]


def _resnet() -> torch.nn.Module:
    import torchvision

    return torchvision.models.resnet18()


def _sides(name: str, options: dict, shapes: list[torch.Size]) -> dict[str, Callable]:
    """Steps with gradients that are the same for all. Torch's optimizer as one fused operator, as
    several on lists, and compiled."""
    torch._dynamo.reset()

    def side(home, compiled: bool = False, **kind) -> Callable[[], list[Tensor]]:
        torch.manual_seed(0)
        where = machine.device()
        parameters = [torch.nn.Parameter(torch.randn(s, device=where)) for s in shapes]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = getattr(home, name)(parameters, **options, **kind)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        read = [p.detach() for p in parameters]

        def once():
            step()
            return read

        return once

    return {
        "eager": side(torch.optim, fused=True),
        "eager, foreach": side(torch.optim, foreach=True),
        "compile": side(torch.optim, compiled=True),
        FASTNET: side(optim, fused=True),
    }
