"""Networks that others trained on ImageNet, with a head of their own for new pictures."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from fastnet.data import IMAGENET_150, IMAGENET_224, Batches, Samples
from fastnet.errors import FastnetError
from fastnet.models import transfer
from fastnet.recipes.augmentation import flips_and_turns
from fastnet.recipes.files import write_whole
from fastnet.recipes.recipe import Recipe, Schedule, Settings
from fastnet.recipes.runtime import Runtime
from fastnet.recipes.tasks import Classification

SGD = partial(torch.optim.SGD, lr=0.001, momentum=0.9, fused=True)


RESNET18_TRANSFER = Recipe(
    name="resnet18-transfer",
    summary="ResNet-18 of ImageNet with a new head, all of it trained, on a folder of pictures; "
    "SGD, lr 0.001, a tenth after every 7 epochs; the best weights are kept",
    task=Classification,
    model=lambda shape, classes, backend, weights: transfer.resnet18(classes, backend, weights),  # noqa: ARG005
    optimizer=SGD,
    loss=F.cross_entropy,
    datasets=(IMAGENET_224,),
    epochs=25,
    batch_size=4,
    test_batch_size=50,
    schedule=Schedule("StepLR", step_size=7, gamma=0.1),
    channels_last=True,
    keep_best=True,
    pretrained=True,
    augment=flips_and_turns,
)
VGG16_TRANSFER = Recipe(
    name="vgg16-transfer",
    summary="VGG16 of ImageNet with frozen convolutions and a new head, on a folder of pictures; "
    "SGD, lr 0.001",
    task=Classification,
    model=lambda shape, classes, backend, weights: transfer.vgg16(classes, backend, weights),  # noqa: ARG005
    optimizer=SGD,
    loss=F.cross_entropy,
    datasets=(IMAGENET_224,),
    epochs=10,
    batch_size=8,
    test_batch_size=50,
    channels_last=True,
    keep_best=True,
    pretrained=True,
    augment=flips_and_turns,
)


def features_once(
    recipe: Recipe, settings: Settings, runtime: Runtime, samples: Samples, path: Path
) -> Samples:
    """What VGG16's convolutions make of a set, `(N, features)`.

    Computed and kept in a file, or read from it where it was made of the same pictures with the
    same weights.

    Raises:
        FastnetError: without safetensors.
    """
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise FastnetError(
            f"Keeping the features needs a package ({error}): pip install 'fastnet[vision]'."
        ) from error
    path = path.with_suffix(".safetensors")
    made_of = {
        "weights": _fingerprint(settings.weights),
        # With no weights to start from, the features are those of the seed.
        "seed": str(settings.seed),
        "backend": settings.backend,
        "pictures": samples.fingerprint(),
    }
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                if file.metadata() == made_of:
                    return _of(file.get_tensor("features"), samples)
        except SafetensorError:
            pass  # cut short or none of ours: made anew
    torch.manual_seed(settings.seed)
    backend = "fastnet" if settings.backend == "fastnet" else "torch"
    convolutions = transfer.vgg16_features(backend, settings.weights).to(runtime.device)
    batches = Batches(
        samples.to(runtime.device), recipe.test_batch_size, recipe.data.mean, recipe.data.std
    )
    with torch.no_grad():
        bar = tqdm(batches, desc="features", unit="batch", leave=False)
        features = torch.cat([convolutions(pictures).float().cpu() for pictures, _ in bar])
    if runtime.is_first:

        def write(file: Path) -> None:
            try:
                save_file({"features": features}, file, metadata=made_of)
            except SafetensorError as error:  # a full disk, for one
                raise OSError(str(error)) from error

        write_whole(path, write)
    return _of(features, samples)


def _fingerprint(weights: str) -> str:
    if not Path(weights).is_file():
        return weights
    digest = hashlib.sha256()
    with open(weights, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _of(features: Tensor, samples: Samples) -> Samples:
    return Samples(features, samples.targets, samples.classes, f"features of {samples.source}")


VGG16_FEATURES = Recipe(
    name="vgg16-features",
    summary="what VGG16's convolutions make of a folder of pictures, computed once and kept, and a "
    "classifier of 256 units on it; Adam, lr 0.001",
    task=Classification,
    # What the weights are for is behind it.
    model=lambda shape, classes, backend, weights: transfer.classifier(shape[0], classes, backend),  # noqa: ARG005
    optimizer=partial(torch.optim.Adam, lr=0.001, fused=True),
    loss=F.cross_entropy,
    datasets=(IMAGENET_150,),
    epochs=30,
    batch_size=20,
    test_batch_size=100,
    keep_best=True,
    pretrained=True,
    prepare=features_once,
)
