"""Writing files whole or not at all, and the checkpoints among them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastnet.errors import FastnetError

CHECKPOINT_FORMAT = 2
# What the names of unfinished files begin with; their ends stay, as some writers go by those.
UNFINISHED = ".fastnet-unfinished-"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make the file under a temporary name, then puts it in place in one step."""
    temporary = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        reason = getattr(error, "strerror", None) or error
        raise FastnetError(f"{path} cannot be written ({reason}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(content, indent=1) + "\n"))


def make_folder(path: Path) -> None:
    """Makes the folder and sees that files can be written there, before any work is done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.glob(f"{UNFINISHED}*"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
        probe = path / f"{UNFINISHED}{os.getpid()}-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FastnetError(
            f"{path} is no folder to write to ({error.strerror or error}); name another with --out."
        ) from error


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    write_whole(
        path, lambda temporary: torch.save({"format": CHECKPOINT_FORMAT, **content}, temporary)
    )


def load_checkpoint(path: Path, recipe: str | None = None) -> dict[str, Any]:
    """Reads a checkpoint that `save_checkpoint` wrote, for this recipe or for any. Runs no code
    from it."""
    if not path.is_file():
        raise FastnetError(
            f"There is no checkpoint {path}: train it first (fastnet train NAME), or name its "
            "folder."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch does not look
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__}")
        made_for = content["recipe"]
        known_format = content["format"] == CHECKPOINT_FORMAT
    # Of damaged bytes torch's reader, and pickle's, make errors of any kind.
    except Exception as error:
        raise FastnetError(
            f"{path} is not a checkpoint that fastnet wrote, or is damaged; delete it, or name "
            "another folder."
        ) from error
    if recipe not in (None, made_for):
        raise FastnetError(
            f"{path} is a checkpoint of {made_for}, not of {recipe}; name another folder."
        )
    if not known_format:
        raise FastnetError(
            f"{path} has checkpoint format {content['format']}; this fastnet reads "
            f"{CHECKPOINT_FORMAT}."
        )
    return content
