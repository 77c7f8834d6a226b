"""Networks as tutorials write them: plain torch, each in the style that it is usually seen in. And
those that a user names."""

from __future__ import annotations

import importlib
import sys

import torch.nn.functional as F
from torch import nn

from fastnet.errors import FastnetError


class MnistNet(nn.Module):
    """Functions in forward; log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 28)
        self.fc2 = nn.Linear(28, 10)

    def forward(self, x):
        x = x.view(-1, 784)
        x = F.relu(self.fc1(x))
        return F.log_softmax(self.fc2(x), dim=1)


class SoftmaxRegression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x):
        return self.linear(x.view(x.size(0), -1))


class ActivationNet(nn.Module):
    """Small Sequentials, with ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(784, 300), nn.ReLU(True))
        self.layer2 = nn.Sequential(nn.Linear(300, 100), nn.ReLU(True))
        self.layer3 = nn.Sequential(nn.Linear(100, 10))

    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = self.layer1(x)
        x = self.layer2(x)
        return self.layer3(x)


class BatchNet(nn.Module):
    """The same with batch normalisation between layer and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(784, 300), nn.BatchNorm1d(300), nn.ReLU(True))
        self.layer2 = nn.Sequential(nn.Linear(300, 100), nn.BatchNorm1d(100), nn.ReLU(True))
        self.layer3 = nn.Sequential(nn.Linear(100, 10))

    def forward(self, x):
        return self.layer3(self.layer2(self.layer1(x.flatten(1))))


class CifarMLP(nn.Module):
    """One ReLU module for several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3 * 32 * 32, 1000)
        self.fc2 = nn.Linear(1000, 500)
        self.fc3 = nn.Linear(500, 10)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = x.view(-1, 3 * 32 * 32)
        x = self.relu(self.fc1(x))
        x = self.relu(self.fc2(x))
        return self.fc3(x)


class SimpleCNN(nn.Module):
    """Layers under names of their own, with add_module.

    Where it is usually seen the pictures are made rows with `view`, which channels_last forbids.
    """

    def __init__(self, channels: int = 3, size: int = 32) -> None:
        super().__init__()
        layer1 = nn.Sequential()
        layer1.add_module("conv1", nn.Conv2d(channels, 32, 3, 1, padding=1))
        layer1.add_module("relu1", nn.ReLU(True))
        layer1.add_module("pool1", nn.MaxPool2d(2, 2))
        self.layer1 = layer1
        layer2 = nn.Sequential()
        layer2.add_module("conv2", nn.Conv2d(32, 64, 3, 1, padding=1))
        layer2.add_module("relu2", nn.ReLU(True))
        layer2.add_module("pool2", nn.MaxPool2d(2, 2))
        self.layer2 = layer2
        layer3 = nn.Sequential()
        layer3.add_module("conv3", nn.Conv2d(64, 128, 3, 1, padding=1))
        layer3.add_module("relu3", nn.ReLU(True))
        layer3.add_module("pool3", nn.MaxPool2d(2, 2))
        self.layer3 = layer3
        layer4 = nn.Sequential()
        layer4.add_module("fc1", nn.Linear(128 * (size // 8) ** 2, 512))
        layer4.add_module("fc_relu1", nn.ReLU(True))
        layer4.add_module("fc2", nn.Linear(512, 64))
        layer4.add_module("fc_relu2", nn.ReLU(True))
        layer4.add_module("fc3", nn.Linear(64, 10))
        self.layer4 = layer4

    def forward(self, x):
        conv1 = self.layer1(x)
        conv2 = self.layer2(conv1)
        conv3 = self.layer3(conv2)
        return self.layer4(conv3.reshape(conv3.size(0), -1))


class ConvNet(nn.Module):
    """Pooling first, then ReLU, with methods of the tensor; dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.max_pool2d(self.conv2(x), 2).relu()
        x = self.fc1(x.view(-1, 320)).relu()
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class Generator(nn.Module):
    """Of a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.gen = nn.Sequential(
            nn.Linear(100, 256),
            nn.ReLU(True),
            nn.Linear(256, 256),
            nn.ReLU(True),
            nn.Linear(256, 784),
            nn.Tanh(),
        )

    def forward(self, x):
        return self.gen(x)


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dis = nn.Sequential(
            nn.Linear(784, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.dis(x).squeeze(1)


def named(name: str) -> nn.Module:
    """What `torchvision:NAME` or `MODULE:CALLABLE` makes.

    Raises:
        FastnetError: for a name that makes no network.
    """
    module, _, function = name.partition(":")
    if not function:
        raise FastnetError(f"--model must be torchvision:NAME or MODULE:CALLABLE, not {name!r}.")
    options = {}
    if module == "torchvision":
        module, options = "torchvision.models", {"weights": None}
    # As `python -m` does, so that a file in the current folder is found.
    sys.path.insert(0, "")
    try:
        network = getattr(importlib.import_module(module), function)(**options)
    except (ImportError, AttributeError, TypeError) as error:
        raise FastnetError(f"--model {name}: {error}.") from error
    if not isinstance(network, nn.Module):
        raise FastnetError(f"--model {name} gave a {type(network).__name__}, not a module.")
    return network


def without_dropout(network: nn.Module) -> nn.Module:
    """The same network, with its dropout at 0: sides would draw other numbers, and are compared."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return network
