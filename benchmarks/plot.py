"""python -m benchmarks.plot: draws docs/speed-up.png from benchmarks/results/<device>.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from benchmarks import harness

# What a training does; a forward pass alone is in the tables.
MODES = ("forward+backward", "step", "epoch")


def speed_ups(rows: list[dict], title: str, modes: tuple[str, ...] = MODES) -> Figure:
    """A panel for each op and mode: bars of fastnet's ratio to the best alternative, one for each
    case and number of threads. Left of the line fastnet is slower.

    Args:
        rows: of a results file.
        title: to stand above.
        modes: which of them.
    """
    panels: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["side"] == harness.FASTNET and row["mode"] in modes:
            cases = panels.setdefault((row["op"], row["mode"]), {})
            cases.setdefault(row["case"], {})[row["threads"]] = float(row["ratio"])
    heights = [1.2 + 0.28 * len(cases) for cases in panels.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, ((op, mode), cases) in zip(grid[:, 0], panels.items(), strict=True):
        counts = sorted({count for ratios in cases.values() for count in ratios}, key=int)
        width = 0.8 / len(counts)
        for number, count in enumerate(reversed(counts)):
            ratios = [ratios.get(count, float("nan")) for ratios in cases.values()]
            places = [
                place + (number - (len(counts) - 1) / 2) * width for place in range(len(cases))
            ]
            # From 1 on, to the right or to the left.
            axes.barh(
                places,
                [ratio - 1 for ratio in ratios],
                left=1,
                height=width,
                color=["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios],
                alpha=1 - 0.5 * number,
                label=f"{count} thread{'s' if count != '1' else ''}",
            )
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(cases)), list(cases), fontsize=8)
        axes.set_title(f"{op}, {mode}", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.invert_yaxis()
        axes.legend(fontsize=7, loc="lower right")
    figure.axes[-1].set_xlabel("times as fast as the best alternative")
    return figure


def main(
    results: Annotated[Path, typer.Argument(help="The results file.")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("docs/speed-up.png"),
) -> None:
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    speed_ups(rows, f"fastnet on {rows[0]['device']}").savefig(out, dpi=80)
    print(out)


if __name__ == "__main__":
    typer.run(main)
