"""Pictures of a training. Every function returns a matplotlib Figure, or fills a given one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn

from fastnet.data import Dataset, Samples
from fastnet.recipes.recipe import NO_MEASURES


def learning_curves(
    history: Sequence[dict], figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Losses on the left, shares (accuracies) on the right, where there are any.

    Args:
        history: one row an epoch (see `training.train`).
        figure: to draw into.
    """
    figure = figure or Figure(figsize=(9, 3.2), layout="constrained")
    names = list(history[0]) if history else []
    losses = [name for name in names if name.endswith("loss")]
    shares = [name for name in names if name not in losses and name not in NO_MEASURES]
    panels = [("loss", losses, 1)] + ([("%", shares, 100)] if shares else [])
    for axes, (label, columns, factor) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for name in columns:
            axes.plot(
                [row["epoch"] for row in history],
                [factor * row[name] for row in history],
                marker=_dot(history),
                markersize=4,
                linestyle="--" if name.startswith("test") else "-",
                label=name.replace("_", " "),
            )
        axes.set(xlabel="epoch", ylabel=label)
        _whole_epochs(axes)
        axes.grid(alpha=0.3)
        if columns:
            axes.legend(fontsize=8)
    return figure


def _dot(history: Sequence[dict]) -> str | None:
    """The marker of an epoch, where they are few; a single one would not be seen without."""
    return "o" if len(history) <= 30 else None


def _whole_epochs(axes: Axes) -> None:
    # Of a single epoch there is one tick; more would be fractions.
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def picture_grid(
    pictures: Tensor,
    titles: Sequence[str] = (),
    colours: Sequence[str] = (),
    figure: Figure | SubFigure | None = None,
    columns: int = 9,
) -> Figure | SubFigure:
    """Pictures, uint8 `(N, channels, height, width)`, row by row, each under its title."""
    rows = math.ceil(len(pictures) / columns)
    figure = figure or Figure(
        figsize=(columns, (1.3 if titles else 1.0) * rows), layout="constrained"
    )
    if not titles:  # one picture of them all is drawn in a tenth of the time
        axes = figure.subplots()
        axes.set_axis_off()
        axes.imshow(_mosaic(pictures.cpu(), columns).numpy(), cmap="gray_r", vmin=0, vmax=255)
        return figure
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, picture, title, colour in itertools.zip_longest(
        axes[: len(pictures)], pictures.cpu(), titles[: len(pictures)], colours[: len(pictures)]
    ):
        # Three channels are shown as they are, and need none of the three.
        axis.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=255)
        if title:
            axis.set_title(title, fontsize=9, color=colour or "black")
    return figure


def _mosaic(pictures: Tensor, columns: int) -> Tensor:
    """Pictures `(N, channels, height, width)` side by side, as imshow takes them."""
    count, channels, height, width = pictures.shape
    gap = max(1, width // 14)
    ground = 0 if channels == 1 else 255
    rows = math.ceil(count / columns)
    tiles = pictures.new_full((rows * columns, channels, height + gap, width + gap), ground)
    tiles[:count, :, :height, :width] = pictures
    tiles = tiles.view(rows, columns, channels, height + gap, width + gap)
    whole = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), -1, channels)
    return whole.squeeze(-1)


def image_grid(
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    classes: Sequence[str],
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Pictures uint8 `(N, channels, height, width)`, each under its predicted and true class."""
    pairs = [(int(p), int(t)) for p, t in zip(predictions, labels, strict=True)]
    long = max((len(name) for name in classes), default=0) > 2
    return picture_grid(
        images,
        [f"{classes[p]}{chr(10) if long else ' '}({classes[t]})" for p, t in pairs],
        ["black" if p == t else "tab:red" for p, t in pairs],
        figure,
    )


def overview(
    title: str,
    history: Sequence[dict],
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    classes: Sequence[str],
) -> Figure:
    """The curves above, the pictures with what the network made of them below."""
    figure, below = _above_and_below(title, history)
    image_grid(images, labels, predictions, classes, below)
    below.suptitle("predicted (true)", fontsize=9)
    return figure


def with_pictures(title: str, history: Sequence[dict], pictures: Tensor, words: str) -> Figure:
    """The curves above, uint8 pictures below."""
    figure, below = _above_and_below(title, history)
    picture_grid(pictures, figure=below, columns=min(10, len(pictures)))
    below.suptitle(words, fontsize=9)
    return figure


def _above_and_below(title: str, history: Sequence[dict]) -> tuple[Figure, SubFigure]:
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    figure.suptitle(title)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    learning_curves(history, above)
    return figure, below


def comparison(histories: Mapping[str, Sequence[dict]]) -> Figure:
    """Several trainings in one figure: one panel for each of their losses and accuracies."""
    columns = [
        name for name in next(iter(histories.values()))[0] if name.endswith(("loss", "accuracy"))
    ]
    rows = math.ceil(len(columns) / 2)
    figure = Figure(figsize=(9, 3.0 * rows), layout="constrained")
    for axes, column in zip(figure.subplots(rows, 2, squeeze=False).flat, columns, strict=False):
        factor = 100 if column.endswith("accuracy") else 1
        # The same curves, as backends give, are seen through each other's gaps, and dots as rings.
        styles = itertools.cycle(("-", "--", ":"))
        sizes = range(3 * len(histories) + 1, 1, -3)
        for (name, history), style, size in zip(histories.items(), styles, sizes, strict=False):
            axes.plot(
                [row["epoch"] for row in history],
                [factor * row[column] for row in history],
                marker=_dot(history),
                markersize=size,
                linestyle=style,
                label=name,
            )
        axes.set(xlabel="epoch", ylabel=column.replace("_", " ") + (", %" if factor > 1 else ""))
        _whole_epochs(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in figure.axes[len(columns) :]:
        axes.set_axis_off()
    return figure


def batch_with_names(network: nn.Module, samples: Samples) -> Figure:  # noqa: ARG001
    """A few pictures of a set, each under the name of its class."""
    shown = samples.spread(16)
    names = [samples.classes[target] for target in shown.targets.tolist()]
    return picture_grid(shown.inputs, names, columns=8)


def weight_templates(network: nn.Module, samples: Samples) -> Figure:
    """What a network without a hidden layer looks for: for each class its weights as a picture,
    blue where ink speaks for the class, red where it speaks against."""
    height, width = samples.inputs.shape[-2:]
    (weight,) = (p.detach().cpu() for p in network.parameters() if p.ndim == 2)
    if weight.shape[0] != len(samples.classes):
        weight = weight.T
    figure = Figure(figsize=(10, 2 * 2.2), layout="constrained")
    limit = weight.abs().max().item()
    for axes, template, name in zip(
        figure.subplots(2, 5).flat, weight, samples.classes, strict=True
    ):
        axes.imshow(template.view(height, width).numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    return figure


def to_pixels(pictures: Tensor, data: Dataset) -> Tensor:
    """Normalised pictures as uint8 again, on the CPU."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return pictures.float().cpu().mul(std).add(mean).mul(255).round().clamp(0, 255).byte()


def live(history: Sequence[dict]) -> None:
    """In a notebook: shows the curves in place of those that the cell showed before."""
    from IPython.display import clear_output, display

    clear_output(wait=True)
    display(learning_curves(history))
