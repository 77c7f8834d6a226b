"""Networks that have learned to see on ImageNet, with a head of one's own.

The networks are torchvision's, with its names in the state dict on both backends. `weights` is
"imagenet" for what they learned there, which torchvision downloads once; "none" for random values;
or a file: a state dict of torchvision's own network with its 1,000 classes, .safetensors or what
torch.save writes.
"""

from __future__ import annotations

import textwrap
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnet.errors import FastnetError
from fastnet.models.layers import accelerated, linear, linear_relu


def resnet18(classes: int, backend: str = "fastnet", weights: str | Path = "imagenet") -> nn.Module:
    """ResNet-18 with a new last layer, all of it to be trained.

    Args:
        classes: how many there are.
        backend: "fastnet" for the fused kernels, where they fit; "torch" for torch's own.
        weights: "imagenet", "none", or a file.

    Shape: pictures `(batch, 3, height, width)` → logits `(batch, classes)`.

    Raises:
        FastnetError: without torchvision, or for weights that cannot be had.
    """
    network = _network("resnet18", weights)
    network.fc = nn.Linear(network.fc.in_features, classes)
    return accelerated(network, backend)


def vgg16(
    classes: int,
    backend: str = "fastnet",
    weights: str | Path = "imagenet",
    frozen: bool = True,
) -> nn.Module:
    """VGG-16 with a new last layer.

    Args:
        classes: how many there are.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.
        weights: "imagenet", "none", or a file.
        frozen: whether the convolutions stay as they are, and only the linear layers are trained.

    Shape: pictures `(batch, 3, height, width)`, of 32 pixels or more each way → logits
    `(batch, classes)`.

    Raises:
        FastnetError: without torchvision, or for weights that cannot be had.
    """
    network = _network("vgg16", weights)
    network.features.requires_grad_(not frozen)
    network.classifier[6] = nn.Linear(network.classifier[6].in_features, classes)
    return accelerated(network, backend)


def vgg16_features(backend: str = "fastnet", weights: str | Path = "imagenet") -> nn.Module:
    """VGG-16's convolutions, for evaluation: their parameters have no gradients.

    Args:
        backend: "fastnet" for the fused kernels, "torch" for torch's own.
        weights: "imagenet", "none", or a file.

    Shape: pictures `(batch, 3, S, S)` → features `(batch, 512 * (S // 32) ** 2)`.

    Raises:
        FastnetError: without torchvision, or for weights that cannot be had.
    """
    features = _network("vgg16", weights).features
    network = nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten()))
    return accelerated(network.requires_grad_(False).eval(), backend)


def classifier(in_features: int, classes: int, backend: str = "fastnet") -> nn.Sequential:
    """What is trained on such features: a linear layer of 256 units with ReLU, dropout of one half,
    and a linear layer.

    Args:
        in_features: of each picture.
        classes: how many there are.
        backend: "fastnet" for the fused kernels, "torch" for torch's own.

    Shape: features `(batch, in_features)` → logits `(batch, classes)`.
    """
    return nn.Sequential(
        linear_relu(in_features, 256, backend), nn.Dropout(0.5), linear(256, classes, backend)
    )


def _network(name: str, weights: str | Path) -> nn.Module:
    """torchvision's network of this name, with its 1,000 classes."""
    try:
        from torchvision import models
    except ImportError as error:
        raise FastnetError(f"{name} needs torchvision: pip install 'fastnet[vision]'.") from error
    network = models.get_model(name)
    if weights == "none":
        return network
    if weights == "imagenet":
        file = _download(models.get_model_weights(name).IMAGENET1K_V1)
    else:
        file = Path(weights)
    try:
        network.load_state_dict(_read(file))
    except (AttributeError, RuntimeError, TypeError) as error:  # as what is no state dict gives
        raise FastnetError(
            f"{file} is no state dict of torchvision's {name} ({_shortened(error)})."
        ) from error
    return network


def _download(weights) -> Path:
    """The file of a member of torchvision's enumerations of weights, where torch.hub keeps it."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not file.is_file():
        try:
            weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        except Exception as error:  # of the many that connections and files have
            raise FastnetError(
                f"{file.name} could not be downloaded to {file.parent} ({_shortened(error)}): put "
                "it there yourself, or name a file with --weights FILE, or begin with random "
                "values, --weights none."
            ) from error
    return file


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FastnetError(f"There is no file {path}: --weights is imagenet, none, or a file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise FastnetError(f"{path} needs safetensors: pip install 'fastnet[vision]'.") from error
    except OSError as error:
        raise FastnetError(f"{path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # of the many that such files lead to
        raise FastnetError(
            f"{path} cannot be read: it is damaged, or holds something else than tensors."
        ) from error


def _shortened(error: Exception) -> str:
    """The beginning of what may be pages of keys."""
    return textwrap.shorten(str(error) or type(error).__name__, 150, placeholder=" …")
