"""The command line: fastnet train | list | export | split | bench | info."""

from __future__ import annotations

import difflib
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

try:
    import matplotlib  # noqa: F401
    import tqdm  # noqa: F401
    import typer
except ImportError as error:
    raise SystemExit(
        f"fastnet: the command line needs more than the kernels do ({error}): "
        "pip install 'fastnet[train]', or in a checkout pip install '.[train]'."
    ) from error

import torch

import fastnet
from fastnet.bench import OPS
from fastnet.errors import FastnetError, NoDataError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OWN = "the training's own"  # the default of an option
OF_DATA, OF_SPEED, OF_RATE = "Data", "Device and speed", "Learning rate"
OF_MODEL = "A network of yours"


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"fastnet {fastnet.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Tell the version, and exit."
        ),
    ] = False,
) -> None:
    """Train the classic networks on fused kernels."""


@app.command("train")
def train_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The training; `fastnet list` names them.")],
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes through the data.", show_default=OWN),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples in a batch.", show_default=OWN)
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same run.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where results are written.", show_default="runs/NAME")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    log_every: Annotated[
        int, typer.Option(min=0, help="Batches from one log line to the next; 0: none.")
    ] = 10,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events, too.")] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="One of those that the training has: mnist, fashion-mnist, cifar-10.",
            show_default="the first of them",
            rich_help_panel=OF_DATA,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the data set's files lie, or shall be downloaded to.",
            show_default="data",
            rich_help_panel=OF_DATA,
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option(help="Download the full data set.", rich_help_panel=OF_DATA)
    ] = False,
    augment: Annotated[
        bool, typer.Option(help="Flip and turn pictures at random.", rich_help_panel=OF_DATA)
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="What transfer starts from: imagenet (downloads them), none, or a file.",
            show_default="imagenet",
            rich_help_panel=OF_DATA,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="One of: auto, cpu, cuda.", rich_help_panel=OF_SPEED)
    ] = "auto",
    backend: Annotated[
        str | None,
        typer.Option(
            help="fastnet, torch (its own layers), or compile (those, compiled).",
            show_default="fastnet",
            rich_help_panel=OF_SPEED,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            help="Train on every backend, and time their steps.", rich_help_panel=OF_SPEED
        ),
    ] = False,
    native: Annotated[
        bool,
        typer.Option(
            help="Train whole epochs in native code: fully connected networks.",
            rich_help_panel=OF_SPEED,
        ),
    ] = False,
    amp: Annotated[
        str | None,
        typer.Option(help="Mixed precision: bf16 or fp16.", rich_help_panel=OF_SPEED),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile the network.", rich_help_panel=OF_SPEED),
    ] = False,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The optimizer's; a scheduler begins with it.",
            show_default=OWN,
            rich_help_panel=OF_RATE,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="none, StepLR, MultiStepLR, ExponentialLR or ReduceLROnPlateau.",
            show_default=OWN,
            rich_help_panel=OF_RATE,
        ),
    ] = None,
    step_size: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs, of StepLR.", show_default="7", rich_help_panel=OF_RATE),
    ] = None,
    milestones: Annotated[
        str | None, typer.Option(help="Epochs, of MultiStepLR: 10,20.", rich_help_panel=OF_RATE)
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            help="What a rate is multiplied by.", show_default="0.1", rich_help_panel=OF_RATE
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Epochs, of ReduceLROnPlateau.",
            show_default="10",
            rich_help_panel=OF_RATE,
        ),
    ] = None,
) -> None:
    """Run a named training."""
    from fastnet.recipes import COMPARISONS, RECIPES, numpy_forward, run
    from fastnet.recipes.runtime import start

    if name == "numpy-forward":
        if given := _options_given(context):
            raise FastnetError(f"{name} takes no options: leave out {', '.join(given)}.")
        print(numpy_forward.run())
        return
    if name not in RECIPES and name not in COMPARISONS:
        known = ["numpy-forward", *RECIPES, *COMPARISONS]
        meant = difflib.get_close_matches(name.lower().replace("_", "-"), known, 1, cutoff=0.75)
        asked = f": did you mean {meant[0]}? There are: " if meant else "; there are: "
        raise FastnetError(f"There is no training {name!r}{asked}{', '.join(known)}.")
    if compare and name in COMPARISONS:
        raise FastnetError(f"{name} is a comparison already: leave out --compare.")
    if compare and (backend or native):
        raise FastnetError("--compare trains on every backend: leave out --backend and --native.")
    recipes = COMPARISONS.get(name) or (RECIPES[name],)
    has_digits = all("mnist" in [data.name for data in recipe.datasets] for recipe in recipes)
    if dataset:
        recipes = tuple(recipe.on(dataset) for recipe in recipes)
    choices = {
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "lr": lr,
        "backend": backend,
        "log_every": log_every,
        "resume": resume,
        "native": native,
        "compile": compiled,
        "tensorboard": tensorboard,
        "augment": augment,
        "weights": weights,
    }
    schedule = {
        "name": scheduler,
        "step_size": step_size,
        "milestones": _numbers("--milestones", milestones),
        "gamma": gamma,
        "patience": patience,
    }
    chosen = [(recipe, recipe.settings(schedule=schedule, **choices)) for recipe in recipes]
    out = out or Path("runs") / name
    began = time.time()
    with start(device, amp) as runtime:
        first, settings = chosen[0]
        if (compare or name in COMPARISONS) and runtime.world_size > 1:
            raise FastnetError(f"{name}: comparisons run in one process, without torchrun.")
        try:
            with runtime.in_turn():
                data = first.data.load(data_dir, download=download)
        except NoDataError as error:
            if not has_digits or first.data.name == "mnist":
                raise
            instead = " and leave out --data-dir" if data_dir else ""
            raise FastnetError(
                f"{str(error).removesuffix('.')}; or choose --dataset mnist{instead}, which needs "
                "no files."
            ) from error
        if runtime.is_first:
            another_rate = "" if lr is None else f"; --lr {lr:g}"
            summary = first.summary if len(chosen) == 1 else _names(recipes)
            print(f"{name}: {summary}{another_rate}")
            print(
                f"data: {data[0].source}; {len(data[0]):,} to train, {len(data[1]):,} to test; "
                f"on {runtime.device.type}"
            )
        try:
            if compare:
                run.compare_backends(first, settings, runtime, out, data)
            elif name in COMPARISONS:
                run.compare_recipes({r.name: (r, s) for r, s in chosen}, runtime, out, data)
            else:
                result = run.run(first, settings, runtime, out, data)
                if runtime.is_first:
                    run.report(first, settings, runtime, out, result)
        except KeyboardInterrupt:
            raise run.stopped(out, resume, began) from None


def _names(recipes) -> str:
    return ", ".join(recipe.name for recipe in recipes)


def _options_given(context: typer.Context) -> list[str]:
    """Those that stand on the command line."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        and context.get_parameter_source(parameter.name).name == "COMMANDLINE"
    ]


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise FastnetError(f"{option} must be numbers from 1 on, such as 10,20, not {text!r}.")
    return tuple(map(int, parts))


@app.command("list")
def list_command() -> None:
    """Name the trainings."""
    from fastnet.recipes import COMPARISONS, RECIPES

    by_hand = "a network of 2-2-2-1 units by hand in NumPy, and the same from torch"
    rows = [
        ("training", "epochs", "batch", ""),
        ("numpy-forward", "", "", by_hand),
        *((r.name, str(r.epochs), str(r.batch_size), r.summary) for r in RECIPES.values()),
        *(
            (name, "", "", f"{_names(recipes)} in one figure")
            for name, recipes in COMPARISONS.items()
        ),
    ]
    width = max(len(name) for name, *_ in rows)
    for name, epochs, batch, summary in rows:
        print(f"{name:{width}}  {epochs:>6}  {batch:>5}  {summary}".rstrip())


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="The folder of a training, such as runs/mnist-net.")],
    file_format: Annotated[
        str, typer.Option("--format", help="safetensors or onnx.")
    ] = "safetensors",
    out: Annotated[
        Path | None, typer.Option(help="The file.", show_default="model.FORMAT in the folder")
    ] = None,
) -> None:
    """Write a trained network for other programs."""
    from fastnet.recipes.export import export

    print(f"written: {export(run, file_format, out)}")


@app.command("split")
def split_command(
    source: Annotated[Path, typer.Argument(help="A flat folder of cat.0.jpg, dog.0.jpg, ...")],
    out: Annotated[Path, typer.Argument(help="Where training/ and validation/ shall be.")],
    validation: Annotated[float, typer.Option(help="The share to validate with.")] = 0.2,
    move: Annotated[
        bool, typer.Option("--move/--copy", help="Move the files, or copy them.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same split.")] = 0,
) -> None:
    """Split a flat folder of pictures into training and validation, class by class."""
    from fastnet.data import split_folder

    counts = split_folder(source, out, validation=validation, move=move, seed=seed)
    for name, (to_train, to_validate) in counts.items():
        print(f"{name}: {to_train:,} to train, {to_validate:,} to validate")
    print(f"fastnet train cats-dogs --data-dir {shlex.quote(str(out))}")


@app.command("bench")
def bench_command(
    ops: Annotated[
        list[str] | None, typer.Argument(help=f"Of: {', '.join(OPS)}.", show_default="all")
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Thread counts: 2,1.", show_default="all cores, and 1")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The most important shapes only.")] = False,
    save: Annotated[bool, typer.Option(help="Write the results file.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="The results file's folder.", show_default="benchmarks/results"),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Write nothing; fail where a ratio is a fifth below the file's."
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Time a network of yours instead: torchvision:NAME, or MODULE:CALLABLE.",
            rich_help_panel=OF_MODEL,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Pictures in a batch.", rich_help_panel=OF_MODEL)
    ] = 8,
    size: Annotated[
        int, typer.Option(min=1, help="Their height and width.", rich_help_panel=OF_MODEL)
    ] = 224,
    channels: Annotated[
        int, typer.Option(min=1, help="And their channels.", rich_help_panel=OF_MODEL)
    ] = 3,
) -> None:
    """Time the ops, the trainings, or a network of yours, against native torch."""
    from fastnet.bench import results, run

    counts = _numbers("--threads", threads) or ()
    if model is not None:
        if ops or quick or check or out or not save:
            raise FastnetError(
                "--model times that network alone, and writes nothing: leave out the ops, --quick, "
                "--check, --out and --no-save."
            )
        for count in counts or (torch.get_num_threads(),):
            torch.set_num_threads(count)
            run.bench_network(model, batch, channels, size)
        return
    out = out or results.RESULTS
    if not run.bench(ops or (), counts, quick, out if save or check else None, check):
        raise typer.Exit(1)


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
        from fastnet.bench.networks import named

        network = named(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing is fused, the report says
            network = fastnet.accelerate(network, inplace=True)
        print(fastnet.accelerate_report(network))
        return
    information = {**fastnet.build_info(), "threads": torch.get_num_threads()}
    if information["torch"] != information["torch_built_with"]:
        information["autograd"] += (
            ", slower on small layers; C++ where it is built for this torch: "
            "pip install --no-build-isolation ."
        )
    if torch.cuda.is_available():
        information["gpu"] = torch.cuda.get_device_name()
    width = max(map(len, information))
    for key, value in information.items():
        print(f"{key:{width}}  {value}")


def main() -> None:
    try:
        app()
    except FastnetError as error:
        print(f"fastnet: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
