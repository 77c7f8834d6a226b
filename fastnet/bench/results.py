"""Measured figures: a row for each side of a case, in a file for each device."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastnet.bench import machine
from fastnet.errors import FastnetError
from fastnet.recipes.files import write_whole

# In a checkout this is where the committed ones are.
RESULTS = Path("benchmarks") / "results"
FASTNET = "fastnet"
# The sides that are fastnet in a memory format. The better one has the case's ratio.
FORMATS = (FASTNET, f"{FASTNET}, channels_last")


@dataclass
class Row:
    """A line of the results file: one side of one case. Times are in microseconds; what was not
    counted is NaN."""

    op: str
    case: str
    mode: str
    threads: int
    side: str
    median_us: float
    p20_us: float
    p80_us: float
    gflops: float
    gbs: float  # GB/s, from the bytes that must be moved
    gflops_limit: float  # measured in the same run: a large product of matrices,
    gbs_limit: float  # and a large copy
    peak_mb: float  # of 10^6 bytes, above what was allocated before
    saved_mb: float  # kept by autograd for the backward pass
    ratio: float  # the best other side's median over this one's; only for fastnet's better one
    calls: int
    series: str
    x: float
    device: str
    torch: str
    fastnet: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, name)) for name in KEY)


KEY = ("op", "case", "mode", "threads", "side")


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a results file by their keys, as text; none where there is no file. What a file
    from before a column was there does not have is empty."""
    if not path.exists():
        return {}
    empty = dict.fromkeys((field.name for field in fields(Row)), "")
    with path.open(newline="") as file:
        rows = [{**empty, **row} for row in csv.DictReader(file)]
    return {tuple(row[name] for name in KEY): row for row in rows}


def has_ratio(row: dict[str, str]) -> bool:
    """Whether a line of a file is fastnet's of its case, in the better memory format."""
    return row["side"] in FORMATS and row["ratio"] not in ("", "nan")


def save(rows: list[Row], folder: Path = RESULTS) -> Path:
    """Puts the rows into this device's file, in place of earlier ones of the same case and side."""
    path = folder / f"{machine.device_slug()}.csv"
    put({row.key: asdict(row) for row in rows}, path)
    return path


def put(rows: Mapping[tuple[str, ...], dict], path: Path) -> None:
    """Puts lines, by their keys, into a file, in place of earlier ones of the same keys."""
    kept = read(path)
    kept.update(rows)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file: Path) -> None:
        with file.open("w", newline="") as lines:
            names = [field.name for field in fields(Row)]
            writer = csv.DictWriter(lines, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(kept.values(), key=_place))

    write_whole(path, write)


def _place(row: dict) -> tuple:
    """Cases by their numbers, not digits: 64 before 256. Of a case the sides stay as they came."""
    numbers = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row["case"])]
    return row["op"], numbers, row["mode"], str(row["threads"])


def fallen(rows: list[Row], folder: Path = RESULTS, share: float = 0.8) -> list[str]:
    """Says which of fastnet's ratios have fallen below a share of those in this device's file.

    Cases that the file does not have are no news.
    """
    path = folder / f"{machine.device_slug()}.csv"
    before = read(path)
    if not before:
        raise FastnetError(f"There is no {path} to compare with: run without --check first.")
    ratios = {key[:4]: float(row["ratio"]) for key, row in before.items() if has_ratio(row)}
    return [
        f"{row.op} {row.case} {row.mode}, {row.threads} threads: {row.ratio:.2f}, was "
        f"{ratios[row.key[:4]]:.2f}"
        for row in rows
        if row.key[:4] in ratios and row.ratio < share * ratios[row.key[:4]]
    ]


def table(rows: Iterable[Row]) -> str:
    """One line a case: fastnet's ratio to the best of the others, how near it comes to what the
    machine can do, and every side's median and peak of memory."""
    lines = []
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.key[:4], []).append(row)
    for (op, case, mode, threads), sides in cases.items():
        ours = next((row for row in sides if row.ratio == row.ratio), None)  # which is not NaN
        ratio = ours.ratio if ours else float("nan")
        share = max(ours.gflops / ours.gflops_limit, ours.gbs / ours.gbs_limit) if ours else 0.0
        of_limit = f"{share:4.0%} of limit" if share else ""
        times = "  ".join(f"{row.side} {_time(row.median_us)}{_megabytes(row)}" for row in sides)
        lines.append(
            f"{op:14} {case:34} {mode:17} {threads} threads  {ratio:5.2f}x  {of_limit:13}  {times}"
        )
    return "\n".join(lines)


def _time(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.1f} µs"
    if microseconds < 1e6:
        return f"{microseconds / 1e3:.2f} ms"
    return f"{microseconds / 1e6:.2f} s"


def _megabytes(row: Row) -> str:
    return f" ({row.peak_mb:.3g} MB)" if row.peak_mb == row.peak_mb else ""
