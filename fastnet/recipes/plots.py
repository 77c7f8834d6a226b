"""Pictures of a training. Every function returns a matplotlib Figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure, SubFigure
from torch import Tensor


def learning_curves(history: Sequence[dict], figure: Figure | SubFigure | None = None) -> Figure:
    """Loss and test accuracy over the epochs, one dict an epoch (see `training.train`)."""
    figure = figure or Figure(figsize=(9, 3.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    losses.plot(epochs, [row["train_loss"] for row in history], marker="o", label="training")
    losses.plot(epochs, [row["test_loss"] for row in history], marker="o", label="test")
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    accuracies.plot(epochs, [100 * row["test_accuracy"] for row in history], marker="o")
    accuracies.set(xlabel="epoch", ylabel="test accuracy, %")
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return figure


def image_grid(
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    classes: Sequence[str],
    figure: Figure | SubFigure | None = None,
    columns: int = 9,
) -> Figure:
    """Pictures uint8 `(N, channels, height, width)`, each under its predicted and true class."""
    rows = math.ceil(len(images) / columns)
    figure = figure or Figure(figsize=(columns, 1.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, label, prediction in zip(axes, images, labels, predictions, strict=False):
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).cpu(), cmap="gray_r")
        right = int(label) == int(prediction)
        axis.set_title(
            f"{classes[prediction]} ({classes[label]})",
            fontsize=9,
            color="black" if right else "tab:red",
        )
    return figure


def overview(
    title: str,
    history: Sequence[dict],
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    classes: Sequence[str],
) -> Figure:
    """The curves above, the pictures below."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    figure.suptitle(title)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    learning_curves(history, above)
    image_grid(images, labels, predictions, classes, below)
    below.suptitle("predicted (true)", fontsize=9)
    return figure
