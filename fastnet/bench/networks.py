"""The network that is timed as tutorials write it, plain torch, and those that a user names."""

from __future__ import annotations

import copy
import importlib
import sys

from torch import nn

from fastnet.errors import FastnetError, in_one_line


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


def named(name: str) -> nn.Module:
    """What `torchvision:NAME` or `MODULE:CALLABLE` makes; of a network `MODULE:NETWORK`, a copy.

    Raises:
        FastnetError: for a name that makes no network.
    """
    module, _, attribute = name.partition(":")
    module = module.removesuffix(".py")
    if not module or not attribute:
        raise FastnetError(f"--model must be torchvision:NAME or MODULE:CALLABLE, not {name!r}.")
    options = {}
    if module == "torchvision":
        module, options = "torchvision.models", {"weights": None}
    # As `python -m` does, so that a file in the current folder is found.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        network = getattr(importlib.import_module(module), attribute)
        # A copy, as several that are named so are trained side by side.
        is_made = isinstance(network, nn.Module)
        network = copy.deepcopy(network) if is_made else network(**options)
    except (Exception, SystemExit) as error:  # it is the user's code, and may be a script
        raise FastnetError(f"--model {name} gave no network ({in_one_line(error)}).") from error
    if not isinstance(network, nn.Module):
        raise FastnetError(f"--model {name} gave a {type(network).__name__}, not a module.")
    return network


def without_dropout(network: nn.Module) -> nn.Module:
    """The same network, with its dropout at 0: sides would draw other numbers, and are compared."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return network
