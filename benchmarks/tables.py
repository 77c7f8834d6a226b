"""python -m benchmarks.tables FILE: puts what was measured into the tables of the documents.

A table stands between `<!-- measured: NAME -->` and `<!-- end -->`; `TABLES` says what is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.plot import DOCUMENTS, Row, measured, of_a_training
from fastnet.bench import results

ROOT = Path(__file__).parent.parent
BOTH = "forward+backward"


class Figures:
    """The rows of a results file, by what they are of."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.most = max((row["threads"] for row in self.rows), key=int, default="1")
        self.sides: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in self.rows:
            key = row["op"], row["case"], row["mode"], row["threads"]
            self.sides.setdefault(key, {})[row["side"]] = row

    def best(self, op: str, case: str, mode: str, side: str, threads: str = "") -> Row | None:
        """The row of a side, in the better of its memory formats; by default with all threads."""
        found = self.sides.get((op, case, mode, threads or self.most), {})
        rows = [row for name, row in found.items() if name in (side, f"{side}, channels_last")]
        return min(rows, key=lambda row: float(row["median_us"]), default=None)


Cell = Callable[[Figures, str, str, str], str]  # of the figures, op, case, mode


def time(side: str, mode: str = "", steps: bool = False) -> Cell:
    """A side's median; with `steps` that of one of the steps that the case's name tells."""

    def cell(figures: Figures, op: str, case: str, own_mode: str) -> str:
        row = figures.best(op, case, mode or own_mode, side)
        if row is None:
            return ""
        count = int(re.search(r"(\d+) steps", case)[1]) if steps else 1
        return duration(float(row["median_us"]) / count)

    return cell


def ratio(mode: str = "", threads: str = "", over: str = "") -> Cell:
    """fastnet's ratio to the best other side, or to the one that is named."""

    def cell(figures: Figures, op: str, case: str, own_mode: str) -> str:
        where = op, case, mode or own_mode
        ours = figures.best(*where, results.FASTNET, threads)
        if ours is None:
            return ""
        if not over:
            return f"{float(ours['ratio']):.2f}"
        other = figures.best(*where, over, threads)
        return f"{float(other['median_us']) / float(ours['median_us']):.1f}" if other else ""

    return cell


def peak(side: str) -> Cell:
    """Megabytes at the peak."""

    def cell(figures: Figures, op: str, case: str, mode: str) -> str:
        row = figures.best(op, case, mode, side)
        return f"{float(row['peak_mb']):.3g}" if row and row["peak_mb"] not in ("", "nan") else ""

    return cell


def duration(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1)):
        value = microseconds / size
        if value >= 1 or unit == "µs":
            return f"{value:#.3g}".rstrip(".") + f" {unit}"
    raise AssertionError(microseconds)


@dataclass
class Table:
    """
    Attributes:
        heading: of the first column, the case.
        op, mode: which rows.
        columns: heading → what stands in a cell.
        cases: a pattern of those it has; by default those whose bars `benchmarks.plot` draws.
        bfloat16: those of bfloat16; by default those of float32.
    """

    heading: str
    op: str
    mode: str
    columns: dict[str, Cell] = field(default_factory=dict)
    cases: str = ""
    bfloat16: bool = False

    def text(self, figures: Figures) -> str:
        rows = [
            row
            for row in figures.rows
            if (row["op"], row["mode"], row["side"]) == (self.op, self.mode, results.FASTNET)
            and row["threads"] == figures.most
            and ("bfloat16" in row["case"]) == self.bfloat16
        ]
        if self.cases:
            rows = [row for row in rows if re.search(self.cases, row["case"])]
        else:
            rows = of_a_training(rows)
        lines = [[self.heading, *self.columns], ["---"] * (1 + len(self.columns))]
        for row in rows:
            cells = (
                cell(figures, self.op, row["case"], self.mode) for cell in self.columns.values()
            )
            lines.append([shown(row["case"]), *cells])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(case: str) -> str:
    """A case's name as the README writes it."""
    case = re.sub(r"^(recipes|mlp_trainer): |, (\d+ steps|bfloat16)$", "", case)
    return re.sub(r"(?<=\d)x(?=\d)", "×", case).replace("->", "→")  # noqa: RUF001


SIDES = {"eager": time("eager"), "torch.compile": time("compile"), "fastnet": time("fastnet")}
ONE = {"ratio, 1 thread": ratio(threads="1")}
PASSES = {
    "ratio": ratio(),
    "forward alone": ratio("forward"),
    "backward alone": ratio("backward"),
}
KERNELS = {"kernels alone": ratio("operators")}
PEAKS = {"peak, eager, MB": peak("eager"), "peak, fastnet, MB": peak("fastnet")}
TABLES = {
    "linear_relu": Table(
        "linear+ReLU, float32",
        "linear_relu",
        BOTH,
        {**SIDES, **PASSES, **KERNELS, **ONE},
    ),
    "linear_relu_bfloat16": Table(
        "linear+ReLU, bfloat16",
        "linear_relu",
        BOTH,
        {**SIDES, **PASSES, **KERNELS, **ONE},
        bfloat16=True,
    ),
    "linear": Table(
        "linear, float32",
        "linear",
        BOTH,
        {**SIDES, "ratio": ratio(), "kernels alone": ratio("operators"), **ONE},
        cases=r"^64x",
    ),
    "cross_entropy": Table(
        "cross-entropy, float32",
        "cross_entropy",
        BOTH,
        {**SIDES, **PASSES, **KERNELS, **ONE, **PEAKS},
        r"^\d+x(2|10|100|1000|131072|32000|21x64x64)$",
    ),
    "cross_entropy_bfloat16": Table(
        "cross-entropy, bfloat16",
        "cross_entropy",
        BOTH,
        {**SIDES, **PASSES, **KERNELS, **ONE},
        bfloat16=True,
    ),
    "conv_relu_pool": Table(
        "conv+ReLU+pool, float32",
        "conv_relu_pool",
        BOTH,
        {**SIDES, **PASSES, **ONE, **PEAKS},
    ),
    "conv_relu_pool_bfloat16": Table(
        "conv+ReLU+pool, bfloat16",
        "conv_relu_pool",
        BOTH,
        {**SIDES, **PASSES, **ONE},
        bfloat16=True,
    ),
    "accelerate": Table(
        "network", "accelerate", "step", {**SIDES, "ratio": ratio(), **ONE}, cases="."
    ),
    "batches": Table(
        "a batch of a set",
        "gather_pictures",
        "forward",
        {**SIDES, "ratio": ratio(), **ONE},
        cases=".",
    ),
    "optimizer": Table(
        "a step", "optimizer", "step", {**SIDES, "ratio": ratio(), **ONE}, cases="."
    ),
    "highlights": Table(
        "a training step",
        "recipes",
        "step",
        {**SIDES, "ratio": ratio()},
        cases="^(mnist-net|activation-net|simple-cnn|gan), batch (64|128), (1x|.*32x32)",
    ),
    "steps": Table("training", "recipes", "step", {**SIDES, "ratio": ratio(), **ONE}, cases="."),
    "epochs": Table(
        "training, an epoch",
        "recipes",
        "epoch",
        {
            "tutorial's script": time("document script"),
            "eager, on fastnet's batches": time("eager"),
            "fastnet": time("fastnet"),
            "over the script": ratio(over="document script"),
            "over eager": ratio(over="eager"),
        },
        cases=".",
    ),
    "mlp_trainer": Table(
        "network, batch: a step",
        "mlp_trainer",
        "epoch",
        {
            "eager": time("eager", steps=True),
            "torch.compile": time("compile", steps=True),
            "MLPTrainer": time("fastnet", steps=True),
            "over eager": ratio(over="eager"),
            "over torch.compile": ratio(over="compile"),
            "over eager, 1 thread": ratio(over="eager", threads="1"),
        },
        cases="steps",
    ),
    "kernels": Table(
        "from C++, without autograd",
        "kernels",
        "C++",
        {
            "torch's kernels": time("eager"),
            "fastnet's": time("fastnet"),
            "ratio": ratio(),
            **ONE,
        },
        cases=".",
    ),
    "peers": Table(
        "beside JAX",
        "peers",
        "step",
        {**SIDES, "JAX": time("jax"), "over JAX": ratio(over="jax")},
        cases="recipes",
    ),
    "peers_epochs": Table(
        "an epoch beside JAX's lax.scan: a step",
        "peers",
        "epoch",
        {
            "eager": time("eager", steps=True),
            "JAX": time("jax", steps=True),
            "MLPTrainer": time("fastnet", steps=True),
            "over JAX": ratio(over="jax"),
        },
        cases="mlp_trainer",
    ),
}


def updated(text: str, rows: Iterable[Row]) -> str:
    """A document with its tables made anew."""
    figures = Figures(rows)

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]].text(figures)}\n\n{match[3]}"

    return re.sub(r"(?s)(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", table, text)


def main(
    file: Annotated[Path, typer.Argument(help="The results file.", exists=True, dir_okay=False)],
) -> None:
    if file.name not in DOCUMENTS:
        raise typer.BadParameter(f"no document tells of {file.name}, but of {', '.join(DOCUMENTS)}")
    rows = measured(file)
    for name in DOCUMENTS[file.name]:
        document = ROOT / name
        document.write_text(updated(document.read_text(), rows))
        print(document)


if __name__ == "__main__":
    typer.run(main)
