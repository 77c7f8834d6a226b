"""Metrics as TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastnet.errors import FastnetError


@contextmanager
def event_log(folder: Path | None, epoch: int) -> Iterator[Callable[[dict], None]]:
    """What takes the rows of the metrics from an epoch on, and writes them into a folder.

    Measures of the training and the test set share a chart. Without a folder nothing is written.

    Raises:
        FastnetError: without the package.
    """
    if folder is None:
        yield lambda _: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FastnetError(
            f"--tensorboard needs a package ({error}): pip install 'fastnet[tensorboard]'."
        ) from error

    def write(row: dict) -> None:
        for name, value in row.items():
            part, _, measure = name.partition("_")
            if name != "epoch":
                tag = f"{measure}/{part}" if part in ("train", "test") else name
                writer.add_scalar(tag, value, row["epoch"])
        writer.flush()

    # What an earlier run wrote of this epoch and later ones is not shown any more.
    with SummaryWriter(str(folder), purge_step=epoch) as writer:
        yield write
