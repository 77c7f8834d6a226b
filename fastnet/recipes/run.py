"""What `fastnet train` does: data, training, pictures and words around them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

import fastnet
from fastnet.data import Samples
from fastnet.errors import FastnetError
from fastnet.recipes import plots
from fastnet.recipes.comparison import step_times, table
from fastnet.recipes.files import make_folder, write_json, write_whole
from fastnet.recipes.recipe import BACKENDS, Recipe, Settings
from fastnet.recipes.runtime import Runtime
from fastnet.recipes.tasks import Task
from fastnet.recipes.training import Result, duration, measures_of, native_trainer, train

# Steps longer than this are compared on request only.
QUICK = 0.05


def run(
    recipe: Recipe,
    settings: Settings,
    runtime: Runtime,
    out: Path,
    data: tuple[Samples, Samples],
    title: str | None = None,
) -> Result:
    """Trains into a folder, and draws there what came of it."""
    train_set, test_set = data
    title = title or f"{recipe.name} on {train_set.source}"
    result = train(
        recipe, settings, train_set, test_set, out, runtime, Painter(title, test_set, out)
    )
    if runtime.is_first and result.history:
        draw_overview(title, result.task, result.history, test_set, result.test_set, out)
        for name, draw in recipe.pictures.items():
            save_figure(draw(result.task.network, test_set), out / name)
    return result


def report(recipe: Recipe, settings: Settings, runtime: Runtime, out: Path, result: Result) -> None:
    """Prints what a training came to, and how long a step takes with and without fastnet."""
    accuracies = [row["test_accuracy"] for row in result.history if "test_accuracy" in row]
    if accuracies:
        kept = max(accuracies) if recipe.keep_best else accuracies[-1]
        print(f"final test accuracy: {kept:.2%}")
    if recipe.report is not None:
        print(recipe.report(result.task.network))
    steps = -(-len(result.train_set) // settings.batch_size)
    fastest = min(row["seconds"] for row in result.history) / steps
    if runtime.world_size == 1 and fastest < QUICK and has_fused_layers(result.task.network):
        sides = ("fastnet", "torch")
        times = step_times(recipe, settings, result.train_set, sides, runtime, seconds=1.5)
        print(
            f"a training step, batch {settings.batch_size}: fastnet {times['fastnet'] * 1e3:.3f} "
            f"ms, native torch {times['torch'] * 1e3:.3f} ms "
            f"({times['torch'] / times['fastnet']:.2f} times as long)"
        )
    if settings.native:
        print(f"of the native loop: {fastest * 1e3:.3f} ms")
    print(f"checkpoint: {result.checkpoint}")
    pictures = [out / name for name in ("overview.png", *recipe.pictures)]
    print(f"picture{'s' if len(pictures) > 1 else ''}: {', '.join(map(str, pictures))}")


def compare_backends(
    recipe: Recipe, settings: Settings, runtime: Runtime, out: Path, data: tuple[Samples, Samples]
) -> None:
    """The same training on every backend, each in its own folder; then their steps in turns."""
    histories, prepared = {}, None
    for backend in BACKENDS:
        own = _part(replace(settings, backend=backend), out / backend)
        result = run(recipe, own, runtime, out / backend, data, f"{recipe.name}, {backend}")
        histories[backend], prepared = result.history, result.train_set
    times = step_times(recipe, settings, prepared, BACKENDS, runtime)
    _tell(out, histories, times)


def _part(settings: Settings, out: Path) -> Settings:
    """Of several trainings, one that may have had no turn yet when they were stopped."""
    return replace(settings, resume=settings.resume and (out / "checkpoint.pt").exists())


def compare_recipes(
    recipes: Mapping[str, tuple[Recipe, Settings]],
    runtime: Runtime,
    out: Path,
    data: tuple[Samples, Samples],
) -> None:
    """Several trainings on the same data, each in a folder of its own."""
    shape, classes = tuple(data[0].inputs.shape[1:]), len(data[0].classes)
    for recipe, settings in recipes.values():
        if settings.native:  # what cannot be, before any of them is trained
            native_trainer(recipe.task(recipe, settings, runtime, shape, classes))
    histories = {
        name: run(recipe, _part(settings, out / name), runtime, out / name, data).history
        for name, (recipe, settings) in recipes.items()
    }
    _tell(out, histories)


def _tell(
    out: Path, histories: Mapping[str, list[dict]], times: Mapping[str, float] | None = None
) -> None:
    """One table, one figure and one file of several trainings, with seconds a step of each."""
    rows, content = [], {}
    for name, history in histories.items():
        seconds = min(row["seconds"] for row in history)
        rows.append({"": name, **measures_of(history[-1]), "an epoch": duration(seconds)})
        content[name] = dict(history[-1])
        if times is not None:
            rows[-1]["ms a step"] = f"{times[name] * 1e3:.3f}"
            rows[-1]["times fastnet's"] = f"{times[name] / times['fastnet']:.2f}"
            content[name]["step_seconds"] = times[name]
    print(table(rows))
    write_json(out / "comparison.json", content)
    save_figure(plots.comparison(histories), out / "comparison.png")
    print(f"picture: {out / 'comparison.png'}")


def has_fused_layers(network: torch.nn.Module) -> bool:
    return any(
        isinstance(module, (fastnet.ConvReLUPool2d, fastnet.Linear)) for module in network.modules()
    )


class Painter:
    """Draws while a training goes on: the overview, from the tenth second on and never for more
    than a small part of the time; and a picture of every epoch where the task has one."""

    SHARE = 0.05

    def __init__(self, title: str, test_set: Samples, out: Path) -> None:
        self.title, self.test_set, self.out = title, test_set, out
        self.next = time.monotonic() + 10

    def __call__(self, task: Task, history: list[dict], prepared: Samples) -> None:
        figure = task.epoch_picture(prepared.spread(10))
        if figure is not None:
            folder = self.out / "samples"
            make_folder(folder)
            if len(history) == 1:  # an earlier run's would be taken for this one's
                for earlier in folder.glob("epoch-*.png"):
                    earlier.unlink()
            save_figure(figure, folder / f"epoch-{len(history):03}.png")
        start = time.monotonic()
        if start >= self.next:
            draw_overview(self.title, task, history, self.test_set, prepared, self.out)
            self.next = time.monotonic() + (time.monotonic() - start) / self.SHARE


def draw_overview(
    title: str, task: Task, history: list[dict], test_set: Samples, prepared: Samples, out: Path
) -> None:
    shown, same = test_set.spread(task.shown), prepared.spread(task.shown)
    save_figure(task.overview(title, history, shown, same), out / "overview.png")


def save_figure(figure, path: Path) -> None:
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def stopped(out: Path, resumed: bool, began: float) -> FastnetError:
    """What to say after Ctrl-C."""
    kept = [
        checkpoint
        for checkpoint in (out / "checkpoint.pt", *sorted(out.glob("*/checkpoint.pt")))
        if checkpoint.exists() and (resumed or checkpoint.stat().st_mtime > began)
    ]
    return FastnetError(
        f"Stopped. {kept[0]} holds the last finished epoch; --resume goes on from it."
        if kept
        else "Stopped. No epoch was finished, so nothing was saved."
    )
