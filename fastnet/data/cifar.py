"""CIFAR-10: 60,000 small colour pictures of ten kinds of things."""

from __future__ import annotations

import codecs
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnet.data.download import download_dataset
from fastnet.data.samples import Dataset, Samples
from fastnet.errors import FastnetError, NoDataError

THINGS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_ALL_FILES = ", ".join(FILES)
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


def load_cifar10(
    data_dir: Path | None = None, *, download: bool = False
) -> tuple[Samples, Samples]:
    """Loads CIFAR-10: 50,000 pictures to train, 10,000 to test.

    The six files of the Python version in `data_dir` (or in its `cifar-10-batches-py`, where
    torchvision keeps them), or those of the binary version there (or in `cifar-10-batches-bin`);
    else, with `download`, what torchvision downloads there. Without `data_dir` it is `./data`.

    Returns:
        The training set and the test set, pictures `(N, 3, 32, 32)`.

    Raises:
        FastnetError: for files that are missing, damaged or cannot be downloaded.
    """
    folder = data_dir if data_dir is not None else Path("data")
    files = _find_files(folder)
    if download and not all(file.is_file() for file in files):
        download_dataset("CIFAR10", folder, f"put {_ALL_FILES} there yourself")
        files = _find_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if len(missing) == len(files):
        raise NoDataError(
            f"The folder {data_dir or './data'} has no CIFAR-10: put {_ALL_FILES} there or into "
            "its cifar-10-batches-py, or add --download."
        )
    if missing:
        raise FastnetError(
            f"{files[0].parent} has {len(files) - len(missing)} of CIFAR-10's six files; missing: "
            f"{', '.join(missing)}."
        )
    parts = [_read(file) for file in files]
    source = f"CIFAR-10 in {files[0].parent}"
    return _join(parts[:-1], source), _join(parts[-1:], source)


def _find_files(folder: Path) -> Sequence[Path]:
    """The six paths in the layout of which all files are there, or the most."""
    layouts = [
        [place / f"{name}{suffix}" for name in FILES]
        for place, suffix in (
            (folder / "cifar-10-batches-py", ""),
            (folder, ""),
            (folder / "cifar-10-batches-bin", ".bin"),
            (folder, ".bin"),
        )
    ]
    return max(layouts, key=lambda files: sum(file.is_file() for file in files))


def _join(parts: Sequence[tuple[Tensor, list[int]]], source: str) -> Samples:
    pictures = torch.cat([pixels for pixels, _ in parts]).view(-1, *_SHAPE)
    targets = torch.tensor([label for _, labels in parts for label in labels], dtype=torch.int64)
    return Samples(pictures, targets, THINGS, source)


def _read(file: Path) -> tuple[Tensor, list[int]]:
    """The pictures of one file, uint8 `(N, 3072)`, and their N labels."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise FastnetError(
            f"{file} cannot be read ({error}): delete it and get it again."
        ) from error
    read = _read_binary if file.suffix == ".bin" else _read_pickle
    pixels, labels = read(file, content)
    if len(pixels) != len(labels):
        raise FastnetError(
            f"{file} has {len(pixels)} pictures, but {len(labels)} labels; get it again."
        )
    for label in labels:
        if not 0 <= label < len(THINGS):
            raise FastnetError(f"{file} has the label {label}; CIFAR-10's are 0 to 9.")
    return pixels, labels


def _read_binary(file: Path, content: bytes) -> tuple[Tensor, list[int]]:
    record = 1 + _PIXELS  # the label, then the picture
    if not content or len(content) % record:
        raise FastnetError(
            f"{file} should hold records of {record} bytes, but holds {len(content)} bytes; get it "
            "again."
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    return records[:, 1:], records[:, 0].tolist()


def _read_pickle(file: Path, content: bytes) -> tuple[Tensor, list[int]]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # which one depends on the byte that is wrong
        raise FastnetError(
            f"{file} cannot be read ({error!r}): delete it and get it again."
        ) from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise FastnetError(
            f"{file} is no batch of CIFAR-10's: it has no b'data' and b'labels'; get it again."
        )
    labels = batch[b"labels"]
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise FastnetError(f"{file} has labels that are no list of whole numbers; get it again.")
    return _pixels(file, batch[b"data"]), labels


def _pixels(file: Path, array: Any) -> Tensor:
    found = f"a {type(array).__name__}"
    match array:
        case _Part(state=(_, shape, _Part(arguments=(dtype, *_)), fortran, bytes(content))):
            if dtype in ("u1", b"u1") and content and shape == (len(content) / _PIXELS, _PIXELS):
                pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                if fortran:
                    return pixels.view(_PIXELS, -1).T.contiguous()
                return pixels.view(-1, _PIXELS)
            found = f"{dtype!r} {shape} in {len(content)} bytes"
    raise FastnetError(
        f"{file} should hold pictures as 'u1' (N, {_PIXELS}), but holds {found}; get it again."
    )


class _Part:
    """Stands for a part of a pickled array: keeps what it would be made of."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


# All that a pickled array refers to; newer versions of numpy write `numpy._core`.
_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Part,
    ("numpy._core.multiarray", "_reconstruct"): _Part,
    ("numpy", "ndarray"): _Part,
    ("numpy", "dtype"): _Part,
    ("_codecs", "encode"): codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    """Calls nothing of what a file names: not even numpy, which a wrong dtype's state crashes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[module, name]


# Mean and standard deviation of the training set's pixels, scaled to 0...1.
CIFAR10 = Dataset("cifar-10", load_cifar10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
