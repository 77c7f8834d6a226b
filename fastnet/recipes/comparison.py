"""What a training step takes on every backend, and tables to tell it in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from fastnet.data import Batches, Samples
from fastnet.recipes.recipe import Recipe, Settings
from fastnet.recipes.runtime import ONE_PROCESS, Runtime
from fastnet.recipes.tasks import step_in_graph


def step_times(
    recipe: Recipe,
    settings: Settings,
    samples: Samples,
    backends: Iterable[str],
    runtime: Runtime = ONE_PROCESS,
    turns: int = 15,
    seconds: float = 20.0,
) -> dict[str, float]:
    """Seconds a training step takes on each backend: medians, the backends taking turns.

    A turn is twenty steps long, as a training has its caches to itself too; fewer of steps so long
    that all turns would take more than so many seconds.
    """
    backends = tuple(backends)
    samples = samples.first(4 * settings.batch_size).to(runtime.device)
    batches = list(Batches(samples, settings.batch_size, recipe.data.mean, recipe.data.std))
    batches = [batch for batch in batches if len(batch[1]) == settings.batch_size] or batches
    shape, classes = tuple(samples.inputs.shape[1:]), len(samples.classes)
    steps = {}
    for backend in backends:
        chosen = replace(settings, backend=backend, native=False)
        task = recipe.task(recipe, chosen, runtime, shape, classes)
        task.network.train()
        steps[backend] = step_in_graph(task)

    def take(step, number: int) -> float:
        start = time.perf_counter()
        step(*batches[number % len(batches)])
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for step in steps.values():  # what is compiled or captured is so with the first ones
        for number in range(5):
            take(step, number)
    longest = sum(take(step, 0) for step in steps.values())
    turns = max(3, min(turns, int(seconds / longest)))
    length = max(1, min(20, int(seconds / longest / turns)))
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for turn in range(turns):
        for backend, step in steps.items():
            times[backend] += [take(step, turn * length + number) for number in range(length)]
    return {backend: statistics.median(taken) for backend, taken in times.items()}


def table(rows: Iterable[dict[str, str]]) -> str:
    """Rows of the same columns as text."""
    rows = list(rows)
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
