"""python -m benchmarks.plot FILE: draws speed-up.png, roofline.png and scaling.png from a results
file, of README.md's into docs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fastnet.bench import results

# Of which results file which documents tell.
DOCUMENTS = {
    "amd-epyc-of-family-26-2-cores-avx512.csv": ("README.md", "docs/measured.md"),
    "intel-r-xeon-r-processor-of-family-6-2-cores-avx512.csv": ("docs/measured-intel.md",),
    "amd-epyc-of-family-25-2-cores-avx512.csv": ("docs/measured-zen4.md",),
    "amd-epyc-of-family-25-2-cores-avx2.csv": ("docs/measured-avx2.md",),
}
# What a training does; a forward pass alone is in the tables.
MODES = ("forward+backward", "step", "epoch")
# Curves whose x is no batch.
LADDER, WIDTH = "ladder", "width"
COLOURS = {
    "linear_relu": "tab:blue",
    "linear": "tab:cyan",
    "cross_entropy": "tab:orange",
    "conv_relu_pool": "tab:green",
}

Row = dict[str, str]


def speed_ups(rows: Iterable[Row], title: str, modes: tuple[str, ...] = MODES) -> Figure | None:
    """A panel for each op and mode: bars of fastnet's ratio to the best alternative, one for each
    case and number of threads. Left of the line fastnet is slower. Of a case at several batches
    there is the one nearest to 64; the others, and what is no case of a training, are curves. None
    where no case has a bar.

    Args:
        rows: of a results file.
        title: to stand above.
        modes: which of them.
    """
    panels: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    rows = [row for row in rows if row["mode"] in modes and results.has_ratio(row)]
    for row in of_a_training(rows):
        cases = panels.setdefault((row["op"], row["mode"]), {})
        cases.setdefault(row["case"], {})[row["threads"]] = float(row["ratio"])
    if not panels:
        return None
    heights = [1.2 + 0.28 * len(cases) for cases in panels.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, ((op, mode), cases) in zip(grid[:, 0], panels.items(), strict=True):
        counts = sorted({count for ratios in cases.values() for count in ratios}, key=int)
        counts.reverse()
        width = 0.8 / len(counts)
        for number, count in enumerate(counts):
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
                color=["tab:red" if ratio < 1 else "tab:green" for ratio in ratios],
                alpha=1 - 0.5 * number,
                label=f"{count} thread{'s' if count != '1' else ''}",
            )
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(_ticks(*axes.get_xlim()))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(cases)), list(cases), fontsize=8)
        axes.set_title(f"{op}, {mode}", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.invert_yaxis()
        axes.legend(fontsize=7, loc="lower right")
    figure.axes[-1].set_xlabel("times as fast as the best alternative")
    return figure


def roofline(rows: Iterable[Row], title: str) -> Figure | None:
    """Every op's forward and backward under what the machine can do: GFLOP/s over the operations
    that there are for each byte that must be moved. Dots are fastnet, rings the best alternative.

    Left of the bend memory is the limit, right of it arithmetic; what fits into a cache may lie
    above the slope, which is that of a copy in main memory, and Winograd's form of a convolution
    above the top, as it needs fewer operations than are counted. None where there is no dot.
    """
    rows = [row for row in rows if row["mode"] == "forward+backward" and row["gflops_limit"]]
    rows = [row for row in rows if float(row["gbs"]) > 0]
    most = max((int(row["threads"]) for row in rows), default=1)
    rows = [row for row in rows if int(row["threads"]) == most and float(row["gflops"]) > 0]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    places = []
    for op in dict.fromkeys(row["op"] for row in rows):
        colour = COLOURS.get(op, "tab:gray")
        for ours, best in _pairs([row for row in rows if row["op"] == op]):
            intensity = float(ours["gflops"]) / float(ours["gbs"])
            places.append(intensity)
            heights = float(best["gflops"]), float(ours["gflops"])
            axes.plot([intensity] * 2, heights, color=colour, linewidth=0.5, alpha=0.5)
            axes.plot(intensity, heights[0], "o", color=colour, fillstyle="none", markersize=4)
            axes.plot(intensity, heights[1], "o", color=colour, markersize=4)
        axes.plot([], [], "o", color=colour, label=f"{op}, fastnet")
        axes.plot([], [], "o", color=colour, fillstyle="none", label=f"{op}, best alternative")
    if not places:
        return None
    gbs = max(float(row["gbs_limit"]) for row in rows)
    first, last = min(places) / 1.5, max(places) * 1.5
    drawn: list[float] = []
    for dtype in ("", "bfloat16"):
        of_dtype = [row for row in rows if ("bfloat16" in row["case"]) == bool(dtype)]
        if not of_dtype:
            continue
        gflops = max(float(row["gflops_limit"]) for row in of_dtype)
        if any(0.8 < gflops / other < 1.25 for other in drawn):
            continue  # the same but for noise, where a processor widens bfloat16
        drawn.append(gflops)
        ends = first, gflops / gbs, last
        axes.plot(ends, [min(gflops, gbs * x) for x in ends], color="black", linewidth=1)
        # At the bend, as there are points on and above the roof farther right.
        axes.text(gflops / gbs, gflops * 1.1, f"{gflops:,.0f} GFLOP/s: a large product")
    axes.text(first, gbs * first * 1.3, f"{gbs:,.0f} GB/s: a large copy", rotation=35)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations for each byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{title}, {most} threads, forward and backward", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    return figure


def scaling(rows: Iterable[Row], title: str) -> Figure | None:
    """Curves of fastnet's ratio over the batch, the width of a layer and the size of what goes in,
    and of the gain of both sides from more threads. A line of panels for each op; None where no
    case is a point of a curve.

    Args:
        rows: of a results file.
        title: to stand above.
    """
    rows = [row for row in rows if row["mode"] in MODES]
    most = max((row["threads"] for row in rows), key=int, default="1")
    ours = [row for row in rows if row["threads"] == most and results.has_ratio(row)]
    by_op: dict[str, dict[str, list[Row]]] = {}
    for row in ours:
        name, is_half = row["series"], "bfloat16" in row["case"]
        if name and not (is_half and name in (LADDER, WIDTH)):
            name += ", bfloat16" * is_half
            by_op.setdefault(row["op"], {}).setdefault(name, []).append(row)
    if not by_op:
        return None
    figure = Figure(figsize=(14, 3.2 * len(by_op)), layout="constrained")
    figure.suptitle(f"{title}: times as fast as the best alternative, {most} threads")
    grid = figure.subplots(len(by_op), 4, squeeze=False)
    for line, (op, series) in zip(grid, by_op.items(), strict=True):
        batches = {name: s for name, s in series.items() if name not in (LADDER, WIDTH)}
        _ratios(line[0], batches, "batch")
        _ratios(line[1], {op: series.get(WIDTH, [])}, "width: features, classes or channels")
        _ratios(line[2], {op: series.get(LADDER, [])}, "bytes of the input")
        _threads(line[3], [row for row in rows if row["op"] == op])
        line[0].set_ylabel(op)
        if line[0].lines:
            line[0].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _ratios(axes: Axes, curves: dict[str, list[Row]], label: str) -> None:
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if not curves:
        axes.set_axis_off()
        return
    for number, (name, curve) in enumerate(curves.items()):
        points = sorted((float(row["x"]), float(row["ratio"])) for row in curve)
        style = (".-", ".--", ".:")[number // 10 % 3]  # there are ten colours
        axes.plot(*zip(*points, strict=True), style, linewidth=1, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(_ticks(*axes.get_ylim()))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    axes.set_xlabel(label, fontsize=8)
    axes.grid(alpha=0.3)


def _ticks(low: float, high: float) -> LogLocator:
    """Powers of two, and where they would be too few for a scale, quarters between them."""
    return LogLocator(base=2, subs=(1, 1.25, 1.5, 1.75) if high < 4 * low else (1,), numticks=16)


def _count(value: float) -> str:
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if value > size or (value == size and size > 1 << 10):
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _threads(axes: Axes, rows: list[Row]) -> None:
    """Speed over the number of threads, as multiples of each side's own with one."""
    speeds: dict[tuple[str, str, bool], dict[int, float]] = {}
    for ours, best in _pairs(rows):
        for row, is_ours in ((ours, True), (best, False)):
            key = row["case"], row["mode"], is_ours
            speeds.setdefault(key, {})[int(row["threads"])] = 1 / float(row["median_us"])
    drawn = set()
    for (_, _, is_ours), by_threads in speeds.items():
        if len(by_threads) < 2 or 1 not in by_threads:
            continue
        label = "fastnet" if is_ours else "best alternative"
        axes.plot(
            sorted(by_threads),
            [by_threads[count] / by_threads[1] for count in sorted(by_threads)],
            ".-" if is_ours else ".:",
            color="tab:green" if is_ours else "tab:gray",
            linewidth=1,
            label=None if label in drawn else label,
        )
        drawn.add(label)
    if not drawn:
        axes.set_axis_off()
        return
    axes.set_xlabel("threads: speed, of that with one", fontsize=8)
    axes.set_xticks(sorted({int(row["threads"]) for row in rows}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def of_a_training(rows: list[Row]) -> list[Row]:
    """Of every series and dtype the case whose batch is nearest to 64, of those timed with any
    number of threads, and all that are in none."""
    nearest: dict[tuple[str | bool, ...], Row] = {}
    for row in rows:
        if row["series"] in (LADDER, WIDTH):
            continue
        own = row["series"] or row["case"]
        key = row["op"], row["mode"], row["threads"], own, "bfloat16" in row["case"]
        other = nearest.setdefault(key, row)
        if row["series"] and abs(float(row["x"]) - 64) < abs(float(other["x"]) - 64):
            nearest[key] = row
    chosen = {(row["op"], row["mode"], row["case"]) for row in nearest.values()}
    return [row for row in rows if (row["op"], row["mode"], row["case"]) in chosen]


def _pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """fastnet's row of every case, with that of the fastest other side."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"], row["mode"], row["threads"]), []).append(row)
    pairs = []
    for sides in cases.values():
        ours = list(filter(results.has_ratio, sides))
        others = [row for row in sides if not row["side"].startswith(results.FASTNET)]
        if ours and others:
            pairs.append((ours[0], min(others, key=lambda row: float(row["median_us"]))))
    return pairs


def measured(file: Path) -> list[Row]:
    """The rows of a results file that a command was given.

    Raises:
        BadParameter: for a file without any, of which nothing could be drawn or told.
    """
    rows = list(results.read(file).values())
    if not rows:
        raise typer.BadParameter(
            f"{file} has no rows: name a file that `fastnet bench` has written"
        )
    return rows


def main(
    file: Annotated[Path, typer.Argument(help="The results file.", exists=True, dir_okay=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the pictures.",
            show_default="docs for the file that README.md tells of, else the file's own",
        ),
    ] = None,
) -> None:
    if out is None:
        out = Path("docs") if "README.md" in DOCUMENTS.get(file.name, ()) else file.parent
    rows = measured(file)
    title = f"fastnet on {rows[0]['device']}"
    for name, draw in (("speed-up", speed_ups), ("roofline", roofline), ("scaling", scaling)):
        figure = draw(rows, title)
        if figure is None:  # as of one op alone
            print(f"{name}.png is left out: {file} has no rows for it.")
            continue
        figure.savefig(out / f"{name}.png", dpi=80)
        print(out / f"{name}.png")


if __name__ == "__main__":
    typer.run(main)
