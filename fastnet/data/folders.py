"""Pictures in folders, one for each class, and how to make those out of a flat folder."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastnet.data.samples import Dataset, Samples
from fastnet.errors import FastnetError

# Each with what others call it.
PARTS = {"training": "train", "validation": "val"}
_LAYOUT = (
    "a folder with training/CLASS/ and validation/CLASS/ is wanted, which `fastnet split` makes of "
    "a flat one with cat.0.jpg, dog.0.jpg and so on"
)


def load_folder(
    data_dir: Path | None = None, *, download: bool = False, size: int
) -> tuple[Samples, Samples]:
    """Loads the pictures in `data_dir/training/CLASS/` and `data_dir/validation/CLASS/`.

    The two may be called `train` and `val`. Pictures become what `Resize(size)` and
    `CenterCrop(size)` of torchvision make of them in RGB: the shorter side is scaled to `size`, the
    middle of the longer one kept.

    Args:
        data_dir: the folder; there is none to take where it is not named.
        download: refused, for these are pictures of your own.
        size: height and width that all get.

    Returns:
        The training set and the validation set, pictures `(N, 3, size, size)`. Classes are in the
        order of their names.

    Raises:
        FastnetError: for folders that are missing, empty or do not agree, and for files that are
            no pictures, or damaged.
    """
    if download:
        raise FastnetError(f"Pictures of your own cannot be downloaded: {_LAYOUT}.")
    if data_dir is None:
        raise FastnetError(f"Name the folder of your pictures with --data-dir: {_LAYOUT}.")
    train, validation = (_open(_part(data_dir, name)) for name in PARTS)
    if train.classes != validation.classes:
        alone = sorted({*train.classes} ^ {*validation.classes})
        raise FastnetError(
            f"{train.root} and {validation.root} must have the same classes, but only one of them "
            f"has: {', '.join(alone)}."
        )
    return _read(train, size), _read(validation, size)


def _part(data_dir: Path, name: str) -> Path:
    for folder in (data_dir / name, data_dir / PARTS[name]):
        if folder.is_dir():
            return folder
    raise FastnetError(f"{data_dir} has no folder {name} (or {PARTS[name]}): {_LAYOUT}.")


def _open(folder: Path) -> Any:
    """The `torchvision.datasets.ImageFolder`."""
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise FastnetError(
            "Reading pictures needs torchvision: pip install 'fastnet[vision]'."
        ) from error
    try:
        return ImageFolder(str(folder))
    except OSError as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise FastnetError(
            f"{folder} must have a folder for each class, with pictures in each ({reason})."
        ) from error


def _read(folder: Any, size: int) -> Samples:
    import numpy as np  # torchvision is there, which needs it
    from torchvision import transforms

    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise FastnetError("Reading pictures needs tqdm: pip install 'fastnet[train]'.") from error

    shape = (len(folder), 3, size, size)
    try:
        pictures = torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise FastnetError(
            f"The {len(folder):,} pictures in {folder.root} do not fit into memory: "
            f"{math.prod(shape) / 1e9:,.0f} GB at {size} x {size}."
        ) from error
    rows = pictures.numpy()
    transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])

    def read(number: int) -> None:
        path, _ = folder.samples[number]
        try:
            rows[number] = np.asarray(transform(folder.loader(path))).transpose(2, 0, 1)
        except Exception as error:  # Pillow has many for a damaged file
            raise FastnetError(
                f"{path} cannot be read as a picture ({error!r}): replace it or take it away."
            ) from error

    # Threads are enough: Pillow decodes and scales outside the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        work = pool.map(read, range(len(folder)))
        for _ in tqdm(work, folder.root, total=len(folder), unit="picture", leave=False):
            pass
    targets = torch.tensor(folder.targets, dtype=torch.int64)
    return Samples(pictures, targets, tuple(folder.classes), f"the pictures in {folder.root}")


def split_folder(
    source: Path, out: Path, *, validation: float = 0.2, move: bool = False, seed: int = 0
) -> dict[str, tuple[int, int]]:
    """Splits a flat folder into the two that `load_folder` reads.

    Pictures are the files `CLASS.ANYTHING.jpg` (or .jpeg, .png; upper or lower case); others stay
    where they are. They go to `out/training/CLASS/` and `out/validation/CLASS/`, where nothing may
    be yet. `out` may be `source` itself, or in it.

    Args:
        source: the flat folder.
        out: made where it is missing.
        validation: the share of each class for validation, between 0 and 1. Each class has at least
            one picture in either part.
        move: takes the pictures out of `source`, once all of them are in `out`. Until then, and
            always without `move`, `source` is left as it is.
        seed: the same seed splits the same files in the same way.

    Returns:
        For each class, how many pictures there are for training and for validation.

    Raises:
        FastnetError: where there is nothing to split, `out` is in use, or a file cannot be written.
    """
    if not 0 < validation < 1:
        raise FastnetError(f"The share for validation must be between 0 and 1, not {validation}.")
    classes = _by_class(source)
    shuffler = random.Random(seed)
    counts, targets = {}, {}
    for name, files in classes.items():
        shuffler.shuffle(files)
        held_out = min(max(round(len(files) * validation), 1), len(files) - 1)
        counts[name] = (len(files) - held_out, held_out)
        for number, file in enumerate(files):
            part = "validation" if number < held_out else "training"
            targets[file] = out / part / name / file.name
    try:
        for folder in (out / part for part in PARTS):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise FastnetError(
                    f"{folder} is there already, and nothing in it shall be lost: name another "
                    "folder, or take it away."
                )
        for folder in {target.parent for target in targets.values()}:
            folder.mkdir(parents=True, exist_ok=True)
        brought: list[Path] = []
        try:
            for file, target in targets.items():
                _bring(file, target, link=move)
                brought.append(target)
        except BaseException:  # a part of them would pass for the whole
            for target in brought:
                target.unlink(missing_ok=True)
            for target in targets.values():
                with suppress(OSError):  # empty folders only
                    target.parent.rmdir()
                    target.parent.parent.rmdir()
            raise
        if move:
            for file in targets:
                file.unlink()
    except OSError as error:
        raise FastnetError(f"{source} could not be split into {out} ({error}).") from error
    return counts


def _by_class(source: Path) -> dict[str, list[Path]]:
    """The pictures of each class in a flat folder, in the order of their names."""
    try:
        found = sorted(source.iterdir())
    except OSError as error:
        raise FastnetError(
            f"{source} is no folder that can be read ({error.strerror}): name the one with the "
            "pictures."
        ) from error
    classes = defaultdict(list)
    for file in found:
        # Hidden files have no name before the first dot.
        name, *others = file.name.split(".")
        picture = file.suffix.lower() in (".jpg", ".jpeg", ".png")
        if name and len(others) > 1 and picture and file.is_file():
            classes[name].append(file)
    if not classes:
        example = next((file.name for file in found if not file.name.startswith(".")), "nothing")
        raise FastnetError(
            f"{source} has no pictures named as cat.0.jpg is, with the class before the first dot, "
            f"but has {example}."
        )
    if len(classes) == 1:
        raise FastnetError(
            f"{source} has pictures of one class only, {next(iter(classes))}; there must be two or "
            "more."
        )
    for name, files in classes.items():
        if len(files) < 2:
            raise FastnetError(
                f"{source} has one picture of {name} only, {files[0].name}; each class needs two "
                "or more."
            )
    return classes


def _bring(file: Path, target: Path, link: bool) -> None:
    """Puts a file's content in place in one step, as a link to it or as a copy."""
    if target.exists():  # to some file systems, names that differ in case are the same
        raise FileExistsError(f"{target} is there already")
    if link:
        with suppress(OSError):  # another file system, or one that has no links
            os.link(file.resolve(), target)
            return
    # Under a name that nothing takes for a picture's, should the copying be interrupted.
    temporary = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(file, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


CATS_DOGS_150 = Dataset("cats-dogs", partial(load_folder, size=150), (0.5,), (0.5,))
# Mean and standard deviation of ImageNet's pixels, scaled to 0...1.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGENET_150 = Dataset("folder", partial(load_folder, size=150), *_IMAGENET)
IMAGENET_224 = Dataset("folder", partial(load_folder, size=224), *_IMAGENET)
