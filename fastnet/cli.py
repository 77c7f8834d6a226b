"""The command line: fastnet train | list | info."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

try:
    import matplotlib  # noqa: F401
    import tqdm  # noqa: F401
    import typer
except ImportError as error:
    raise SystemExit(
        f"fastnet: the command line needs more than the kernels do ({error}): "
        "pip install 'fastnet[train]'."
    ) from error

import torch

import fastnet
from fastnet.errors import FastnetError
from fastnet.models.layers import BACKENDS

app = typer.Typer(
    help="Train the classic networks on fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("train")
def train_command(
    name: Annotated[str, typer.Argument(help="The training; `fastnet list` names them.")],
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes through the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures in a batch.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    backend: Annotated[str, typer.Option(help=f"One of: {', '.join(BACKENDS)}.")] = "fastnet",
    dataset: Annotated[
        str | None, typer.Option(help="The data set, for trainings that have several.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the data set's files lie, or shall be downloaded to.")
    ] = None,
    download: Annotated[bool, typer.Option(help="Download the full data set.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where results are written.", show_default="runs/NAME")
    ] = None,
    native: Annotated[
        bool, typer.Option(help="Train whole epochs in native code: fully connected networks.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    log_every: Annotated[
        int, typer.Option(min=0, help="Batches from one log line to the next; 0: none.")
    ] = 10,
) -> None:
    """Run a named training."""
    from fastnet.recipes import RECIPES, plots, training
    from fastnet.recipes.files import write_whole

    if name not in RECIPES:
        raise FastnetError(f"There is no training {name!r}; there are: {', '.join(RECIPES)}.")
    if backend not in BACKENDS:
        raise FastnetError(f"--backend must be one of {', '.join(BACKENDS)}, not {backend!r}.")
    if native and backend != "fastnet":
        raise FastnetError(f"--native is fastnet's own loop, and has no --backend {backend}.")
    recipe = RECIPES[name].on(dataset) if dataset else RECIPES[name]
    settings = training.Settings(
        epochs=epochs or recipe.epochs,
        batch_size=batch_size or recipe.batch_size,
        seed=seed,
        backend=backend,
        log_every=log_every,
        resume=resume,
        native=native,
    )
    out = out or Path("runs") / name
    train_set, test_set = recipe.data.load(data_dir, download=download)
    print(f"{name}: {recipe.summary}")
    print(f"data: {train_set.source}; {len(train_set):,} to train, {len(test_set):,} to test")
    checkpoint = out / "checkpoint.pt"

    def saved_at() -> float:
        return checkpoint.stat().st_mtime if checkpoint.exists() else 0

    before = saved_at()
    try:
        result = training.train(recipe, settings, train_set, test_set, out)
    except KeyboardInterrupt:
        kept = (
            f"{checkpoint} holds the last finished epoch; --resume goes on from it."
            if saved_at() > before or (resume and before)
            else "No epoch was finished, so nothing was saved."
        )
        raise FastnetError(f"Stopped. {kept}") from None

    shown = 18
    figure = plots.overview(
        f"{name} on {train_set.source}",
        result.history,
        test_set.images[:shown],
        test_set.labels[:shown],
        training.predict(recipe, result.model, test_set, shown),
        test_set.classes,
    )
    picture = out / "overview.png"
    write_whole(picture, lambda path: figure.savefig(path, dpi=120, format="png"))

    print(f"final test accuracy: {result.history[-1]['test_accuracy']:.2%}")
    times = training.step_times(recipe, settings, train_set, BACKENDS)
    print(
        f"a training step, batch {settings.batch_size}: fastnet {times['fastnet'] * 1e3:.3f} ms, "
        f"native torch {times['torch'] * 1e3:.3f} ms "
        f"({times['torch'] / times['fastnet']:.2f} times as long)"
    )
    if native and result.history:
        batches = -(-len(train_set) // settings.batch_size)
        seconds = min(row["seconds"] for row in result.history)
        print(f"of the native loop: {seconds / batches * 1e3:.3f} ms")
    print(f"checkpoint: {result.checkpoint}")
    print(f"picture: {picture}")


@app.command("list")
def list_command() -> None:
    """Name the trainings."""
    from fastnet.recipes import RECIPES

    width = max(map(len, RECIPES))
    for recipe in RECIPES.values():
        print(f"{recipe.name:{width}}  {recipe.summary}")


@app.command("info")
def info_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="Tell what accelerate fuses in this network: torchvision:NAME, or MODULE:CALLABLE "
            "for what a callable of yours returns.",
        ),
    ] = None,
) -> None:
    """Tell what this build is, and what of it runs here; or what it would do for a network."""
    if model is not None:
        print(fastnet.accelerate_report(fastnet.accelerate(_network(model))))
        return
    information = {**fastnet.build_info(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        information["gpu"] = torch.cuda.get_device_name()
    width = max(map(len, information))
    for key, value in information.items():
        print(f"{key:{width}}  {value}")


def _network(name: str) -> torch.nn.Module:
    module, _, function = name.partition(":")
    if not function:
        raise FastnetError(f"--model must be torchvision:NAME or MODULE:CALLABLE, not {name!r}.")
    options = {}
    if module == "torchvision":
        module, options = "torchvision.models", {"weights": None}
    # As `python -m` does, so that a file in the current folder is found.
    sys.path.insert(0, "")
    try:
        network = getattr(importlib.import_module(module), function)(**options)
    except (ImportError, AttributeError, TypeError) as error:
        raise FastnetError(f"--model {name}: {error}.") from error
    if not isinstance(network, torch.nn.Module):
        raise FastnetError(f"--model {name} gave a {type(network).__name__}, not a module.")
    return network


def main() -> None:
    try:
        app()
    except FastnetError as error:
        print(f"fastnet: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
