"""Downloads, which are left to torchvision."""

from __future__ import annotations

from pathlib import Path

from fastnet.errors import FastnetError


def download_dataset(name: str, folder: Path, instead: str) -> None:
    """Downloads a data set into `folder`, laid out as torchvision lays it out.

    Args:
        name: the set's class in `torchvision.datasets`.
        folder: made where it is missing.
        instead: what the user can do where this fails; it ends the sentence that says so.

    Raises:
        FastnetError: without torchvision, or where the download fails.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise FastnetError(
            f"Downloading {name} needs torchvision: pip install 'fastnet[vision]'."
        ) from error
    try:
        getattr(datasets, name)(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        raise FastnetError(
            f"{name} could not be downloaded to {folder} ({reason}): {instead}."
        ) from error
